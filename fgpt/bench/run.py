"""From scenarios to records: skip, resume, then measure cohort by cohort within a time budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from fgpt.bench import record
from fgpt.bench.job import Job, job_of, skip_reason
from fgpt.bench.machine import peak, product_tflops
from fgpt.bench.measure import (
    ENOUGH_ROUNDS,
    NO_TIME,
    RequestDetails,
    ScenarioRun,
    measure,
    split_into_cohorts,
)
from fgpt.bench.scenario_record import (
    key_of,
    latest_by_key,
    measured_record,
    run_of_record,
    samples_per_s,
    unmeasured_record,
)
from fgpt.bench.scenarios import Scenario
from fgpt.bench.worker_group import WorkerGroup
from fgpt.config.presets import PRESETS
from fgpt.errors import UserError
from fgpt.model.count import activation_bytes, n_params

PROCESS_BYTES = 2**30
"""Memory of a rank before it builds a model."""


@dataclass(frozen=True)
class Options:
    """How to measure."""

    out: Path
    """The JSONL file of the records."""
    budget_s: float
    """Seconds for all scenarios; those for which none are left are not measured."""
    again: bool
    """Also measure scenarios that have a record of this code on this machine."""
    log: Callable[[str], None]
    """Prints a line of progress."""
    request_details: RequestDetails
    start: Callable[[Job], WorkerGroup]
    hosts: dict[str, int] | None
    """Slots by host of a hostfile, whose nodes run one scenario at a time."""


def run_scenarios(
    scenarios: Sequence[Scenario], device: torch.device, options: Options
) -> list[dict[str, Any]]:
    """Measure what this machine can; return the records of all scenarios, in their order."""
    start = time.monotonic()
    record.must_be_writable(options.out)
    speeds = product_tflops(device)
    environment = {
        **record.environment(device),
        "product_tflops": speeds,
        "hosts": options.hosts,
    }
    jobs = {scenario: job_of(scenario, device.type) for scenario in scenarios}
    n_gpus = sum((options.hosts or {}).values()) or torch.cuda.device_count()
    known = {} if options.again else latest_by_key(record.read(options.out))
    records: dict[Scenario, dict[str, Any]] = {}
    pending: list[Scenario] = []
    for scenario, job in jobs.items():
        if why := skip_reason(scenario, device.type, n_gpus):
            records[scenario] = unmeasured_record(scenario, job, environment, why)
            record.append(options.out, records[scenario])
        elif old := known.get(key_of(scenario, job, environment)):
            records[scenario] = old
            options.log(f"{scenario.label}: measured before")
        else:
            pending.append(scenario)
    if pending:
        precisions = sorted({jobs[scenario].precision for scenario in pending})
        peaks = {precision: peak(device, precision, speeds) for precision in precisions}
        shares_cores = device.type == "cpu" and not options.hosts
        bench = _Bench(jobs, environment, peaks, shares_cores, records, options)
        exclusive = options.hosts or device.type == "cuda"
        limit = 1 if exclusive else cohort_limit([jobs[scenario] for scenario in pending])
        bench.measure_all(pending, limit, start)
    return [records[scenario] for scenario in scenarios]


@dataclass
class _Bench:
    """What all cohorts share."""

    jobs: Mapping[Scenario, Job]
    environment: Mapping[str, Any]
    peaks: Mapping[str, tuple[float | None, str | None]]
    """`fgpt.bench.machine.peak` by precision."""
    shares_cores: bool
    """The ranks of a scenario share the cores of one CPU."""
    records: dict[Scenario, dict[str, Any]]
    options: Options

    def measure_all(self, pending: Sequence[Scenario], limit: int, start: float) -> None:
        """Give each cohort a part of the remaining time, in proportion to its ranks."""
        scenarios = list(pending)
        for scenario in pending if limit > 1 else ():
            # a reference that has a record already is measured again, beside the others
            reference = self._reference(scenario)
            if reference is None or reference in scenarios:
                continue
            if self.records.get(reference, {}).get("state") != "skipped":
                scenarios.append(reference)
        cohorts = list(split_into_cohorts(scenarios, limit))
        n_ranks = [sum(self.jobs[scenario].ranks for scenario in cohort) for cohort in cohorts]
        for number, cohort in enumerate(cohorts):
            left_s = self.options.budget_s - (time.monotonic() - start)
            if number == 0 or left_s > 0:
                self._measure_cohort(cohort, left_s * n_ranks[number] / sum(n_ranks[number:]))
            else:
                for scenario in cohort:
                    self._no_time(scenario)

    def _no_time(self, scenario: Scenario) -> None:
        """Record that the time was over; the next call with this --out measures it."""
        if scenario in self.records:
            return
        job = self.jobs[scenario]
        self.records[scenario] = unmeasured_record(scenario, job, self.environment, NO_TIME)
        record.append(self.options.out, self.records[scenario])

    def _measure_cohort(self, cohort: Sequence[Scenario], budget_s: float) -> None:
        options = self.options
        pairs = [(scenario, self.jobs[scenario]) for scenario in cohort]
        runs = measure(pairs, budget_s, options.start, options.log, options.request_details)
        if record.source_hash() != self.environment["source"]:
            raise UserError("fgpt/ or ds_configs/bench changed during the measurement: run again")
        by_scenario = {run.scenario: run for run in runs}
        for run in runs:
            if run.out_of_time:
                self._no_time(run.scenario)
            if run.scenario in self.records:
                continue  # a reference that was measured again
            reference = self._reference_run(run.scenario, by_scenario)
            peak = self._peak_per_rank(run.job)
            new = measured_record(run, reference, self.environment, peak)
            self.records[run.scenario] = new
            record.append(options.out, new)
            options.log(_progress_line(new))

    def _reference(self, scenario: Scenario) -> Scenario | None:
        """The scenario that this one is compared with."""
        for other in self.jobs:
            if (other.bench, other.workload, other.variant.name) == (
                scenario.bench, scenario.workload, scenario.reference,
            ):  # fmt: skip
                return other
        return None

    def _reference_run(
        self, scenario: Scenario, runs: Mapping[Scenario, ScenarioRun]
    ) -> ScenarioRun | None:
        """The reference's run in the same cohort, else the one in its record."""
        reference = self._reference(scenario)
        if reference is None:
            return None
        if reference in runs:
            return runs[reference] if runs[reference].failure is None else None
        old = self.records.get(reference)
        if old is None or "train" not in old:
            return None
        return run_of_record(reference, self.jobs[reference], old)

    def _peak_per_rank(self, job: Job) -> tuple[float | None, str | None]:
        """TFLOP/s of one rank, and the source of the figure."""
        tflops, source = self.peaks[job.precision]
        if tflops is not None and self.shares_cores:
            tflops /= job.ranks
        return tflops, source


def cohort_limit(jobs: Sequence[Job]) -> int:
    """How many scenarios fit into the free memory at the same time."""
    need = max(job.ranks * PROCESS_BYTES + _model_bytes(job) for job in jobs)
    return max(1, int(psutil.virtual_memory().available) // need)


def _model_bytes(job: Job) -> int:
    """Weights, gradients, moments, a copy, and twice the activations of a forward pass."""
    attention = job.overrides.get("model.attention", "sdpa")
    config = replace(PRESETS[job.model], attention=attention)
    activations = activation_bytes(config, job.micro_batch, job.seq_len, 4)
    return 24 * n_params(config) + 2 * activations


def _progress_line(new: Mapping[str, Any]) -> str:
    name = f"{new['row']}, {new['env_name']}"
    if new["state"] == "failed":
        return f"{name}: failed: {new['why']}"
    ratio = "" if new["ratio"] is None else f", {new['ratio']['train'][0]:.2f} x {new['reference']}"
    wrong = "" if new["why"] is None else f"  WRONG: {new['why']}"
    n_rounds = len(new["train"]["round_s"])
    few = f", {n_rounds} rounds: the time was over" if n_rounds < ENOUGH_ROUNDS else ""
    return f"{name}: {samples_per_s(new, 'train'):,.1f} samples/s{ratio}{few}{wrong}"
