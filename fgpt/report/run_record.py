"""What a training run has recorded so far, read from its directory while it runs or afterwards."""

from __future__ import annotations

import json
import math
import socket
import statistics
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from fgpt.errors import CheckpointError, UserError
from fgpt.utils.files import read_regular

if TYPE_CHECKING:
    from fgpt.checkpoint.manifest import Start

METRICS, CONFIG, SAMPLES = "metrics.jsonl", "config.json", "samples.jsonl"
RECENT_S, RECENT_STEPS = 60.0, 10
"""A run of another machine is running if its last record is younger than this and so many steps."""
StepRecord = dict[str, Any]
"""One line of metrics.jsonl: at least step, loss, skipped and step_s (see `fgpt.train.metrics`)."""
Points = list[tuple[int, float]]
"""(step, value)."""


@dataclass(frozen=True)
class Curves:
    """The losses of a run in columns; nats per token, all finite."""

    steps: list[int]
    """Training steps, without skipped ones."""
    losses: list[float]
    """Training loss of each."""
    valid_steps: list[int]
    """Steps at which the validation loss was measured."""
    valid_losses: list[float]
    """Validation loss of each."""
    all_steps: int
    """Number of training steps, skipped ones included."""
    seconds: float
    """Total time of all steps."""


@dataclass(frozen=True)
class Records:
    """The records of a metrics.jsonl."""

    steps: list[StepRecord] = field(default_factory=list)
    """Training steps in their order."""
    evaluations: Points = field(default_factory=list)
    """(step, validation loss in nats per token)."""
    suites: dict[str, Points] = field(default_factory=dict)
    """Suite of questions -> (step, accuracy)."""

    def curves(self) -> Curves:
        """The losses in columns."""
        train = [(r["step"], r["loss"]) for r in self.steps if not r["skipped"]]
        train = [(step, loss) for step, loss in train if math.isfinite(loss)]
        valid = [(step, loss) for step, loss in self.evaluations if math.isfinite(loss)]
        return Curves(
            steps=[step for step, _ in train],
            losses=[loss for _, loss in train],
            valid_steps=[step for step, _ in valid],
            valid_losses=[loss for _, loss in valid],
            all_steps=len(self.steps),
            seconds=sum(record["step_s"] for record in self.steps),
        )


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    path: Path
    """Its directory."""
    name: str
    """Distinguishes it from the other runs of a report."""
    records: Records
    """Its metrics.jsonl."""
    config: dict[str, Any]
    """config.json: the resolved configuration with the origin of each value; {}: none."""
    is_running: bool
    """Whether a process trains it now."""
    age_s: float
    """Seconds since its last record."""

    def section(self, *names: str) -> dict[str, Any]:
        """A section of the configuration; {}: absent."""
        found: Any = self.config
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    @property
    def last_step(self) -> int | None:
        """The step that it trains to, if config.json says so."""
        steps = self.section("run", "train").get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def model(self) -> str:
        """The model's preset."""
        return str(self.section("run", "model").get("preset", "?"))

    @property
    def state(self) -> str:
        """running, ended (at its last step) or stopped (before it)."""
        if self.is_running:
            return "running"
        reached = self.records.steps[-1]["step"] if self.records.steps else 0
        return "ended" if self.last_step is not None and reached >= self.last_step else "stopped"

    @cached_property
    def samples(self) -> list[Sample]:
        """Texts over time."""
        return read_samples(self.path / SAMPLES)

    @cached_property
    def starts(self) -> list[Start]:
        """The history in the newest checkpoint that can be read; []: there is none."""
        # imported here: the manifest needs torch, which takes a second
        from fgpt.checkpoint.directory import CheckpointDirectory
        from fgpt.checkpoint.manifest import read_manifest

        for checkpoint in CheckpointDirectory(self.path / "checkpoints").complete():
            try:
                return list(read_manifest(checkpoint).history)
            except (CheckpointError, OSError):
                continue
        return []

    def tokens(self, step: int) -> int:
        """Tokens seen after a step, by the run's records.

        Records of earlier versions do not say: then by the starts in the newest checkpoint.
        """
        steps, counts = self._token_counts
        i = bisect_right(steps, step)
        if i and steps[i - 1] == step:
            return counts[i - 1]
        # between two that are known, and beyond the last one, steps have equally many tokens
        if i < len(steps):
            begin, before = (steps[i - 1], counts[i - 1]) if i else (0, 0)
            return before + (counts[i] - before) * (step - begin) // max(1, steps[i] - begin)
        begin, before = (steps[-1], counts[-1]) if steps else (0, 0)
        return before + (step - begin) * self._tokens_per_step

    @cached_property
    def _token_counts(self) -> tuple[list[int], list[int]]:
        """Steps in ascending order, and the tokens seen after each."""
        known = {r["step"]: r["tokens"] for r in self.records.steps if type(r.get("tokens")) is int}
        if not known:
            known = {start.step: start.tokens for start in self.starts}
        steps = sorted(known)
        return steps, [known[step] for step in steps]

    @property
    def _tokens_per_step(self) -> int:
        """Of the last start; 0: unknown."""
        length = self.section("run", "data").get("seq_len")
        length = length or self.section("run", "model").get("max_seq_len", 0)
        return int(self.section("batch").get("global_size", 0)) * int(length)


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Read a run directory. Raises UserError if it is none, or has no record yet."""
    metrics = path / METRICS
    try:
        records = read_metrics(metrics)
        config = _object(path / CONFIG)
        age_s = time.time() - metrics.stat().st_mtime
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}: {Path(error.filename or metrics).name}; name the directory"
            " of a training run (--run_dir; `fgpt runs` lists them)"
        ) from error
    return RunRecord(
        path=path,
        name=name or path.name or str(path),
        records=records,
        config=config,
        is_running=_is_running(path / "lock", records, age_s),
        age_s=age_s,
    )


def read_metrics(path: Path) -> Records:
    """Return the records of a metrics.jsonl. Raises OSError.

    A run that was killed may leave an incomplete line; lines that are no records are ignored.
    """
    found = Records()
    for record in _lines(path):
        step, accuracy = record.get("step"), record.get("accuracy")
        value = accuracy.get("value") if isinstance(accuracy, dict) else None
        if type(step) is not int or not is_number(step):
            continue
        if is_number(record.get("valid_loss")):
            found.evaluations.append((step, record["valid_loss"]))
        elif value is not None and is_number(value):
            found.suites.setdefault(str(record.get("suite")), []).append((step, value))
        elif is_number(record.get("loss")) and is_number(record.get("step_s")):
            if not math.isfinite(record["step_s"]):
                continue
            found.steps.append(record | {"skipped": bool(record.get("skipped"))})
    return found


def read_samples(path: Path) -> list[Sample]:
    """Return the texts of a samples.jsonl, the last one of each step; []: there is no such file."""
    samples: dict[int, Sample] = {}
    try:
        for record in _lines(path):
            if type(record.get("step")) is int and "text" in record:
                prompt, text = str(record.get("prompt", "")), str(record["text"])
                samples[record["step"]] = Sample(record["step"], prompt, text)
    except OSError:
        pass
    return list(samples.values())


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines."""
    for line in read_regular(path).splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_regular(path))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_running(lock: Path, records: Records, age_s: float) -> bool:
    """Whether the process that wrote the lock file still exists; taking the lock would interfere
    with a run that starts. Of another machine: whether there are recent records.
    """
    try:
        pid, _, host = read_regular(lock).decode().strip().partition(" on ")
        if host in ("", socket.gethostname()):
            return psutil.Process(int(pid)).create_time() <= lock.stat().st_mtime + 1
    except (OSError, ValueError, psutil.Error):
        return False
    step_s = statistics.median(r["step_s"] for r in records.steps) if records.steps else 0.0
    return age_s < RECENT_S + RECENT_STEPS * step_s


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """A name for each path: as many of its last parts as tell it from the others."""
    parts = [path.absolute().parts for path in paths]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]))
    return names


def finite(values: Sequence[float | None]) -> list[float | None]:
    """JSON has no NaN and no infinity: None instead."""
    return [None if v is None or not math.isfinite(v) else v for v in values]
