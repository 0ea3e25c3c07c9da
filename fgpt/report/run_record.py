"""What a training run has recorded so far, read from its directory while it runs or afterwards."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from fgpt.errors import CheckpointError, UserError
from fgpt.utils.files import read_regular

if TYPE_CHECKING:
    from fgpt.checkpoint.manifest import Start

METRICS, CONFIG, SAMPLES = "metrics.jsonl", "config.json", "samples.jsonl"
StepRecord = dict[str, Any]
"""One line of metrics.jsonl: at least step, loss, skipped and step_s (see `fgpt.train.metrics`)."""


@dataclass(frozen=True)
class Curves:
    """The columns of metrics.jsonl; losses in nats per token."""

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
    steps: list[StepRecord]
    """Training steps in their order."""
    evaluations: list[tuple[int, float]]
    """(step, validation loss in nats per token)."""
    suites: dict[str, list[tuple[int, float]]]
    """Suite of questions -> (step, accuracy)."""
    config: dict[str, Any]
    """config.json: the resolved configuration with the origin of each value; {}: none."""
    samples: list[Sample]
    """Texts over time."""
    starts: list[Start]
    """From the newest checkpoint; []: there is none."""
    is_running: bool
    """Whether a process of this machine trains it now."""
    age_s: float
    """Seconds since its last record."""

    @property
    def last_step(self) -> int | None:
        """The step that it trains to, if config.json says so."""
        return self.config.get("run", {}).get("train", {}).get("steps")

    @property
    def model(self) -> str:
        """The model's preset."""
        return str(self.config.get("run", {}).get("model", {}).get("preset", "?"))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step of the last start; 0: unknown."""
        config = self.config
        length = config.get("run", {}).get("data", {}).get("seq_len")
        length = length or config.get("run", {}).get("model", {}).get("max_seq_len", 0)
        return int(config.get("batch", {}).get("global_size", 0)) * int(length)

    def tokens(self, step: int) -> int:
        """Tokens seen after a step; starts with other batches count with their own."""
        begin, before = 0, 0
        for start in self.starts:
            if start.step <= step:
                begin, before = start.step, start.tokens
        return before + (step - begin) * self.tokens_per_step

    def curves(self) -> Curves:
        """The losses in columns."""
        return _curves(self.steps, self.evaluations)

    @property
    def state(self) -> str:
        """running, ended (at its last step) or stopped (before it)."""
        if self.is_running:
            return "running"
        reached = self.steps[-1]["step"] if self.steps else 0
        return "ended" if self.last_step is not None and reached >= self.last_step else "stopped"


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Read a run directory. Raises UserError if it is none, or has no record yet."""
    metrics = path / METRICS
    try:
        steps, evaluations = read_metrics(metrics)
        suites = _read_suites(metrics)
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
        steps=steps,
        evaluations=evaluations,
        suites=suites,
        config=config,
        samples=_read_samples(path / SAMPLES),
        starts=_read_starts(path / "checkpoints"),
        is_running=_is_running(path / "lock"),
        age_s=age_s,
    )


def read_metrics(path: Path) -> tuple[list[StepRecord], list[tuple[int, float]]]:
    """Return the records of steps and the evaluations of a metrics.jsonl. Raises OSError.

    A run that was killed may leave an incomplete line; lines that are no records are ignored.
    """
    steps: list[StepRecord] = []
    evaluations: list[tuple[int, float]] = []
    for record in _lines(path):
        if not _is_number(record.get("step")):
            continue
        if _is_number(record.get("valid_loss")):
            evaluations.append((record["step"], record["valid_loss"]))
        elif _is_number(record.get("loss")) and _is_number(record.get("step_s")):
            steps.append(record | {"skipped": bool(record.get("skipped"))})
    return steps, evaluations


def read_curves(metrics: Path) -> Curves:
    """Read a metrics file. Raises OSError."""
    return _curves(*read_metrics(metrics))


def _curves(records: Sequence[StepRecord], evaluations: Sequence[tuple[int, float]]) -> Curves:
    train = [(r["step"], r["loss"]) for r in records if not r["skipped"]]
    return Curves(
        steps=[step for step, _ in train],
        losses=[loss for _, loss in train],
        valid_steps=[step for step, _ in evaluations],
        valid_losses=[loss for _, loss in evaluations],
        all_steps=len(records),
        seconds=sum(record["step_s"] for record in records),
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines."""
    for line in read_regular(path).splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _read_suites(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The accuracies in a metrics.jsonl."""
    suites: dict[str, list[tuple[int, float]]] = {}
    for record in _lines(path):
        accuracy = record.get("accuracy")
        if not isinstance(accuracy, list) or not accuracy or not _is_number(accuracy[0]):
            continue
        if _is_number(record.get("step")):
            suites.setdefault(str(record.get("suite")), []).append((record["step"], accuracy[0]))
    return suites


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_regular(path))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_samples(path: Path) -> list[Sample]:
    """The texts of samples.jsonl, the last one of each step."""
    samples: dict[int, Sample] = {}
    try:
        for record in _lines(path):
            if _is_number(record.get("step")) and "text" in record:
                prompt, text = str(record.get("prompt", "")), str(record["text"])
                samples[record["step"]] = Sample(record["step"], prompt, text)
    except OSError:
        pass  # none was written
    return list(samples.values())


def _read_starts(checkpoints: Path) -> list[Start]:
    """The history in the newest checkpoint that can be read."""
    # imported here: the manifest needs torch, which takes a second
    from fgpt.checkpoint.directory import CheckpointDirectory
    from fgpt.checkpoint.manifest import read_manifest

    for checkpoint in CheckpointDirectory(checkpoints).complete():
        try:
            history = read_manifest(checkpoint).history
        except (CheckpointError, OSError):
            continue
        return list(history)
    return []


def _is_running(lock: Path) -> bool:
    """Whether the process that wrote the lock file still exists; taking the lock would interfere
    with a run that starts.
    """
    try:
        pid = int(read_regular(lock).split()[0])
        return psutil.Process(pid).create_time() <= lock.stat().st_mtime + 1
    except (OSError, ValueError, IndexError, psutil.Error):
        return False


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
