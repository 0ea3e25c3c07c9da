"""From scenarios to records: skip, resume, measure wave after wave within a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from fgpt.bench import entry, record
from fgpt.bench.console import samples_per_s
from fgpt.bench.job import Job, job_of, obstacle
from fgpt.bench.measure import KINDS, Extras, Measured, measure, waves
from fgpt.bench.peak import peak
from fgpt.bench.scenarios import Scenario
from fgpt.bench.worker_group import WorkerGroup
from fgpt.config.presets import PRESETS
from fgpt.errors import UserError
from fgpt.model.count import activation_bytes, n_params

PROCESS_BYTES = 2**30
"""Memory of a rank before it has a model."""


@dataclass(frozen=True)
class Options:
    """How to measure."""

    out: Path
    """The JSONL file of the records."""
    budget_s: float
    """Seconds for all of it; every scenario gets `MIN_ROUNDS` rounds, however long they take."""
    again: bool
    """Measure what has a record of this code on this machine, too."""
    say: Callable[[str], None]
    extras: Extras
    start: Callable[[Job], WorkerGroup]
    hosts: dict[str, int] | None
    """Of a hostfile, with their slots: the ranks of two scenarios never live at the same time."""

    @property
    def n_gpus(self) -> int:
        """Slots of all hosts; 0 without a hostfile."""
        return sum((self.hosts or {}).values())


def run(
    scenarios: Sequence[Scenario], device: torch.device, options: Options
) -> list[dict[str, Any]]:
    """Measure what can be measured here; the records of all scenarios, in their order."""
    began = time.monotonic()
    record.must_be_writable(options.out)
    environment = {**record.environment(device), "hosts": options.hosts}
    jobs = {scenario: job_of(scenario, device.type) for scenario in scenarios}
    known = {} if options.again else entry.latest(record.read(options.out))
    found: dict[Scenario, dict[str, Any]] = {}
    left: list[Scenario] = []
    for scenario, job in jobs.items():
        if why := obstacle(scenario, device.type, options.n_gpus or torch.cuda.device_count()):
            found[scenario] = entry.skipped(scenario, job, environment, why)
            record.append(options.out, found[scenario])
        elif old := known.get(entry.key_of(scenario, job, environment)):
            found[scenario] = old
            options.say(f"{scenario.row.name}, {scenario.rung.name}: measured before")
        else:
            left.append(scenario)
    if left:
        precisions = sorted({jobs[scenario].precision for scenario in left})
        peaks = {precision: peak(device, precision) for precision in precisions}
        shared = device.type == "cpu" and not options.hosts
        bench = Bench(jobs, environment, peaks, shared, found, options)
        limit = 1 if options.hosts or device.type == "cuda" else at_once([jobs[s] for s in left])
        _all_waves(bench, left, limit, began)
    return [found[scenario] for scenario in scenarios]


@dataclass
class Bench:
    """What the waves share."""

    jobs: Mapping[Scenario, Job]
    environment: Mapping[str, Any]
    peaks: Mapping[str, tuple[float | None, str | None]]
    cores_shared: bool
    """The ranks are processes on the same cores."""
    found: dict[Scenario, dict[str, Any]]
    options: Options

    def reference_of(self, scenario: Scenario) -> Scenario | None:
        """The scenario that this one is compared with."""
        same = (s for s in self.jobs if s.row == scenario.row and s.bench == scenario.bench)
        return next((s for s in same if s.rung.name == scenario.reference), None)

    def peak_of(self, job: Job) -> tuple[float | None, str | None]:
        """Of one rank; on a CPU the ranks share what all its cores do."""
        tflops, source = self.peaks[job.precision]
        shared = job.ranks if self.cores_shared and tflops is not None else 1
        return (None if tflops is None else tflops / shared), source

    def wave(self, wave: Sequence[Scenario], budget_s: float) -> None:
        """Measure and record."""
        options = self.options
        pairs = [(scenario, self.jobs[scenario]) for scenario in wave]
        measured = measure(pairs, budget_s, options.start, options.say, options.extras)
        if record.source() != self.environment["source"]:
            raise UserError("fgpt/ or ds_configs/bench changed while it was measured: start again")
        by_scenario = {one.scenario: one for one in measured}
        for one in measured:
            if one.scenario in self.found:
                continue  # a reference again
            reference = self._reference(one.scenario, by_scenario)
            self.found[one.scenario] = entry.entry(
                one, reference, self.environment, self.peak_of(one.job)
            )
            record.append(options.out, self.found[one.scenario])
            options.say(_line(self.found[one.scenario]))

    def _reference(
        self, scenario: Scenario, measured: Mapping[Scenario, Measured]
    ) -> Measured | None:
        """As measured in the same wave, else as recorded."""
        other = self.reference_of(scenario)
        if other is None:
            return None
        if other in measured:
            return measured[other] if measured[other].why is None else None
        old = self.found.get(other)
        if old is None or "train" not in old:
            return None
        return _again(other, self.jobs[other], old)


def _again(scenario: Scenario, job: Job, old: Mapping[str, Any]) -> Measured:
    """A recorded scenario, as if it had been measured now."""
    first = {name: old[name] for name in ("memory", "losses", "config", "grid", "setup_s")}
    first["batches"] = {kind: old[kind]["batches"] for kind in KINDS}
    rounds = {kind: list(old[kind]["round_s"]) for kind in KINDS}
    return Measured(scenario, job, first, rounds)


def _all_waves(bench: Bench, left: Sequence[Scenario], limit: int, began: float) -> None:
    """Each wave gets its part of the time that is left, by its processes."""
    wanted = list(left)
    for scenario in left if limit > 1 else ():
        reference = bench.reference_of(scenario)
        if reference is not None and reference not in wanted and obstacle_free(bench, reference):
            wanted.append(reference)
    plan = list(waves(wanted, limit))
    for number, wave in enumerate(plan):
        ranks = [sum(bench.jobs[s].ranks for s in w) for w in plan[number:]]
        left_s = bench.options.budget_s - (time.monotonic() - began)
        bench.wave(wave, left_s * ranks[0] / sum(ranks))


def obstacle_free(bench: Bench, scenario: Scenario) -> bool:
    """Whether a scenario can be measured here."""
    return bench.found.get(scenario, {}).get("state") != "skipped"


def at_once(jobs: Sequence[Job]) -> int:
    """How many scenarios may live at the same time in the memory that is free."""
    need = max(job.ranks * PROCESS_BYTES + _model_bytes(job) for job in jobs)
    return max(1, int(psutil.virtual_memory().available) // need)


def _model_bytes(job: Job) -> int:
    """Weights, gradients, moments, a copy, and twice what a forward pass keeps."""
    config = replace(PRESETS[job.model], attention=job.sets.get("model.attention", "sdpa"))
    kept = activation_bytes(config, job.micro_batch, job.seq_len, 4)
    return 24 * n_params(config) + 2 * kept


def _line(one: Mapping[str, Any]) -> str:
    """A record in one line."""
    name = f"{one['row']}, {one['env_name']}"
    if one["state"] == "failed":
        return f"{name}: failed: {one['why']}"
    speed = samples_per_s(one, "train")
    wrong = "" if one["why"] is None else f"  WRONG: {one['why']}"
    ratio = "" if one["ratio"] is None else f", {one['ratio']['train'][0]:.2f} x {one['reference']}"
    return f"{name}: {speed:,.1f} samples/s{ratio}{wrong}"
