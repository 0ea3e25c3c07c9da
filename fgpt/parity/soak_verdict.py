"""What `fgpt soak` compares of its two runs, and its report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fgpt.checkpoint.reader import CheckpointReader, open_intact
from fgpt.engine.state import WEIGHT
from fgpt.parity.soak_run import GLOBAL_BATCH, Outcome, Soak, SoakRecord

OUTLIVE_LIMIT_S = 10.0
"""The longest that a rank may outlive its launcher, in seconds."""


@dataclass(frozen=True)
class RunResult:
    """What one run has come to."""

    weights: str
    """SHA-256 of the final weights."""
    states: str
    """SHA-256 of the optimizer's final states."""
    samples: str
    """SHA-256 of the numbers and tokens of all samples, in the order of the steps."""
    losses: tuple[float, ...]
    """Of each step."""
    departure: str = ""
    """The first step that did not read its samples, each once and in order."""


def read_result(soak: Soak, run: str) -> RunResult:
    """Return the result of the run in this directory of the soak's. Raises CheckpointError."""
    run_dir = soak.folder / run
    reader = open_intact(run_dir / "checkpoints" / f"step_{soak.steps:08d}")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    losses = {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}
    steps = read_samples(sorted((soak.folder / "samples").glob(f"{run}_*.jsonl")))
    samples = json.dumps([steps.get(step) for step in range(1, soak.steps + 1)])
    return RunResult(
        _hash(reader, weights=True),
        _hash(reader, weights=False),
        hashlib.sha256(samples.encode()).hexdigest(),
        tuple(losses.get(step, float("nan")) for step in range(1, soak.steps + 1)),
        _departure(steps, soak.steps),
    )


def _hash(reader: CheckpointReader, *, weights: bool) -> str:
    digest = hashlib.sha256()
    for name, record in sorted(reader.manifest.tensors.items()):
        for state in sorted(record.states):
            if (state == WEIGHT) == weights:
                tensor = reader.read(name, state).contiguous()
                digest.update(f"{name} {state} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


Rows = list[tuple[int, str]]
"""Number and hash of samples, sorted."""


def read_samples(files: Iterable[Path]) -> dict[int, Rows]:
    """Return step -> its samples, of the last start that has trained it.

    `files`: NAME_START_RANK.jsonl, sorted. Ranks of one data rank share its samples; where they
    differ, all are listed.
    """
    starts: dict[str, dict[int, set[tuple[int, tuple[tuple[int, str], ...]]]]] = {}
    for file in files:
        steps = starts.setdefault(file.name.split("_")[1], {})
        for line in file.read_text().splitlines():
            try:
                step, data_rank, rows = json.loads(line)
            except ValueError:  # the process was killed while it wrote it
                continue
            part = tuple((number, tokens) for number, tokens in rows)
            steps.setdefault(step, set()).add((data_rank, part))
    last: dict[int, Rows] = {}
    for steps in starts.values():
        for step, parts in steps.items():
            last[step] = sorted(row for _, rows in parts for row in rows)
    return last


def _departure(steps: dict[int, Rows], n_steps: int) -> str:
    for step in range(1, n_steps + 1):
        found = [number for number, _ in steps.get(step, [])]
        expected = list(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH))
        if found != expected:
            return f"step {step} read the samples {found}, not {expected}"
    return ""


@dataclass
class SoakVerdict:
    """The comparison of both runs."""

    faulty: RunResult
    clean: RunResult
    record: SoakRecord
    planned: int
    """Faults asked for."""
    departures: list[str] = field(default_factory=list)
    """Everything that is not as it should be."""

    def __post_init__(self) -> None:
        for kind in ("weights", "states", "samples"):
            if getattr(self.faulty, kind) != getattr(self.clean, kind):
                self.departures.append(f"{kind} differ from the clean run's")
        pairs = zip(self.faulty.losses, self.clean.losses, strict=True)
        if step := next((i for i, (a, b) in enumerate(pairs, 1) if a != b), None):
            self.departures.append(f"the loss of step {step} differs from the clean run's")
        for name in ("faulty", "clean"):
            if text := getattr(self, name).departure:
                self.departures.append(f"the {name} run: {text}")
        for outcome in self.record.outcomes:
            if outcome.problem:
                self.departures.append(f"{outcome.fault}: {outcome.problem}")
            if (outcome.outlived_s or 0) > OUTLIVE_LIMIT_S:
                text = f"a rank outlived the launcher by {outcome.outlived_s:.1f} s"
                self.departures.append(f"{outcome.fault}: {text}")

    @property
    def lost_steps(self) -> int:
        """Steps that were trained again."""
        return sum(outcome.lost_steps for outcome in self.record.outcomes)

    @property
    def recovery_s(self) -> float:
        """Mean time from a fault to the end of the first step after it."""
        times = [o.recovery_s for o in self.record.outcomes if o.recovery_s is not None]
        return fmean(times) if times else 0.0

    @property
    def goodput(self) -> float:
        """Time of the finished run's steps / time since the first start."""
        return self.record.useful_s / max(1e-9, self.record.wall_s)

    def lines(self) -> list[str]:
        """Return the report, without the lines of the faults."""
        n, record, steps = len(self.record.outcomes), self.record, len(self.faulty.losses)
        gone = [o.gone_s for o in record.outcomes if o.gone_s is not None]
        outlived = [o.outlived_s for o in record.outcomes if o.outlived_s is not None]
        samples = f"{steps * GLOBAL_BATCH} samples, each once and in order"
        return [
            *(self._equality(kind) for kind in ("weights", "states", "samples")),
            f"  losses   {steps} steps; the samples: {samples}",
            f"  {n} of {self.planned} faults in {record.wall_s / 60:.1f} min, {record.starts}"
            f" starts; {self.lost_steps} steps lost; mean time to recover {self.recovery_s:.1f} s;"
            f" goodput {self.goodput:.1%} (time of the finished run's steps / time)",
            f"  the last process was gone after at most {max(gone, default=0):.1f} s; ranks"
            f" outlived the launcher by at most {max(outlived, default=0):.1f} s",
            *(f"  DEPARTS: {text}" for text in self.departures),
            "the runs differ" if self.departures else "equal to the clean run, bit for bit",
        ]

    def _equality(self, kind: str) -> str:
        mine, clean = getattr(self.faulty, kind), getattr(self.clean, kind)
        state = "equal" if mine == clean else "DIFFERS"
        return f"  {kind:<8} sha256 {mine}, clean run {clean}: {state}"

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        results = {}
        for name in ("faulty", "clean"):
            results[name] = {
                key: getattr(getattr(self, name), key) for key in ("weights", "states", "samples")
            }
        return {
            "equal": not self.departures,
            "departures": self.departures,
            "sha256": results,
            "steps": len(self.faulty.losses),
            "starts": self.record.starts,
            "lost_steps": self.lost_steps,
            "mean_recovery_s": self.recovery_s,
            "goodput": self.goodput,
            "wall_s": self.record.wall_s,
            "segments": [asdict(segment) for segment in self.record.segments],
            "faults": [
                asdict(outcome) | {"lost_steps": outcome.lost_steps}
                for outcome in self.record.outcomes
            ],
        }


def outcome_line(number: int, outcome: Outcome) -> str:
    """Return the report's line of a fault."""
    head = f"{number:>4}  step {outcome.step:>4}  {outcome.layout:<10} {outcome.fault:<52}"
    if outcome.gone_s is None and not outcome.problem:
        return f"{head} the run went on"
    parts = []
    if outcome.gone_s is not None:
        parts.append(f"all gone after {outcome.gone_s:4.1f} s")
    if outcome.recovery_s is not None:
        parts.append(f"{outcome.lost_steps:>2} lost, recovered after {outcome.recovery_s:4.1f} s")
    return f"{head} {'; '.join([*parts, *[outcome.problem] * bool(outcome.problem)])}"
