"""The records of `fgpt bench single` and `fgpt bench multi`: their contents, and strict reading."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fgpt.errors import UserError, printable

FORMAT = 1
SECTIONS = {"single": ("ladder", "memory", "compare"), "multi": ("layouts", "strong", "weak")}
"""The sections of each benchmark, in the order of the report."""
STATES = ("measured", "skipped", "failed", "wrong")
UNKNOWN_HARDWARE = "hardware not recorded"
MEMORY_TEXTS = {"resident above the libraries": "RSS above the baseline after imports"}
"""Values of `memory.what` in the records -> the text shown."""

Ratio = tuple[float, float, float]
"""Median, lowest and highest round."""
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Rounds:
    """Timings of several rounds."""

    round_s: tuple[float, ...]
    """Seconds of each round."""
    samples: int
    """Samples per round, of all ranks together."""

    @property
    def samples_per_s(self) -> float:
        """Samples per second, from the median of the rounds."""
        return self.samples / statistics.median(self.round_s)

    def relative_to(self, other: Rounds) -> Ratio:
        """Speed relative to another's rounds, which were measured in turn with these."""
        ours, theirs = self.samples, other.samples
        pairs = zip(self.round_s, other.round_s, strict=False)  # an interrupted one may lack one
        ratios = [ours / theirs * their_s / our_s for our_s, their_s in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)

    def ms_for(self, samples: int) -> Ratio:
        """Milliseconds for this number of samples: median, shortest and longest round."""
        scale = 1000 * samples / self.samples
        low, high = min(self.round_s), max(self.round_s)
        return scale * statistics.median(self.round_s), scale * low, scale * high


@dataclass(frozen=True)
class Measurement:
    """The measured values of one scenario."""

    ranks: int
    grid: str
    """For example `tp 1 x pp 1 x cp 1 x dp 1`."""
    batch: str
    """For example `32 x 128, fp32`: samples per step x tokens per sample, precision."""
    seq_len: int
    """Tokens per sample."""
    train: Rounds
    predict: Rounds | None
    train_ratio: Ratio | None
    """Training speed relative to the reference's."""
    predict_ratio: Ratio | None
    memory_bytes: int
    """Peak of the rank that needs most."""
    memory_kind: str
    """What the peak counts."""
    memory_ratio: float | None
    """The peak relative to the reference's."""
    loss_difference: float | None
    """Largest relative difference from the reference's losses."""
    loss_bound: float | None
    """Its accepted bound."""
    flops_per_token: float | None
    peak_tflops: float | None
    """Of one rank's device."""
    peak_source: str | None
    breakdown: dict[str, float] | None
    """Fractions of a step's time: compute, communication, pipeline, data."""
    sent_bytes: dict[str, float] | None
    """Per step and kind of process group, by the rank that sends most."""
    trace: dict[str, float] | None
    """Fractions of a traced step's time, by kind of kernel."""

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second, of all ranks together."""
        return self.train.samples_per_s * self.seq_len

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization, as a fraction; None if the FLOPs or the peak are unknown."""
        if not self.flops_per_token or not self.peak_tflops:
            return None
        return self.tokens_per_s * self.flops_per_token / (self.peak_tflops * 1e12 * self.ranks)


@dataclass(frozen=True)
class Record:
    """One scenario on one machine: its measurement, or why it was not measured."""

    bench: str
    workload: str
    """Model preset; "row" in the file."""
    parameters: int | None
    env_name: str
    """Name of the variant."""
    description: str
    section: str
    order: tuple[int, int]
    reference: str
    """The env_name that ratios are relative to."""
    state: str
    why: str | None
    hardware: str
    environment: dict[str, Any]
    """Time, command, commit and versions; may be empty."""
    measurement: Measurement | None

    @property
    def on_gpu(self) -> bool:
        """Whether the hardware is a GPU: a CPU's name ends with its number of cores."""
        return self.hardware != UNKNOWN_HARDWARE and not re.search(r", \d+ cores?$", self.hardware)

    @property
    def table(self) -> tuple[str, str, str]:
        """The table that it belongs to: benchmark, hardware, section."""
        return self.bench, self.hardware, self.section

    @property
    def train_ratio(self) -> float:
        """Median of the training speed relative to the reference's; 0 if it was not compared."""
        found = self.measurement and self.measurement.train_ratio
        return found[0] if found else 0.0


def read_records(paths: Sequence[Path], *, require_records: bool) -> list[Record]:
    """The last record of every scenario on each hardware, in the report's order (GPUs first).

    Other benchmarks' lines are ignored. Raises UserError for a damaged file and, with
    `require_records`, for a file without any record.
    """
    records = []
    for path in paths:
        records += (found := _read_file(path))
        if require_records and not found:
            raise UserError(
                f"{path}: holds no record of `fgpt bench single` or `multi`: name a file they wrote"
            )
    latest: dict[tuple[str, str, str, str], Record] = {}
    for record in _with_unique_machines(records):
        key = record.bench, record.workload, record.env_name, record.hardware
        # a later skipped or failed attempt does not replace a measurement
        if record.measurement or key not in latest or not latest[key].measurement:
            latest[key] = record
    return sorted(latest.values(), key=_sort_key)


def _with_unique_machines(records: Sequence[Record]) -> list[Record]:
    """The records, with a number before the names of different machines that share one."""
    machines: dict[str, list[object]] = {}
    named = []
    for record in records:
        same_name = machines.setdefault(record.hardware, [])
        machine = record.environment.get("machine")
        if machine is not None and machine not in same_name:
            same_name.append(machine)
        # a record without one is of the machine of the record before it
        number = len(same_name) if machine is None else same_name.index(machine) + 1
        name = f"machine {number}: {record.hardware}" if number > 1 else record.hardware
        named.append(replace(record, hardware=name))
    return named


def _sort_key(record: Record) -> tuple[object, ...]:
    bench, section = list(SECTIONS).index(record.bench), SECTIONS[record.bench]
    place = section.index(record.section), record.order
    return bench, not record.on_gpu, record.hardware, place


def _read_file(path: Path) -> list[Record]:
    lines = list(_read_lines(path))
    hardware = next((name for _, raw in lines if (name := _hardware(raw))), UNKNOWN_HARDWARE)
    records = []
    for place, raw in lines:
        # a skipped scenario may lack its machine: it is that of the record before it
        hardware = _hardware(raw) or hardware
        try:
            records.append(_record(raw, hardware))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            why = str(error)[:120]
            problem = f"lacks {why}" if isinstance(error, KeyError) else f"is damaged: {why}"
            raise UserError(f"{place}: the record {problem} -> measure it again") from error
    return records


def _hardware(raw: dict[str, Any]) -> str | None:
    environment = raw.get("environment")
    name = environment.get("hardware") if isinstance(environment, dict) else None
    return name if isinstance(name, str) else None


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (FILE:LINE, object) for the lines of the two benchmarks."""
    for place, raw in read_objects(path):
        if "format" not in raw or str(raw.get("bench")) not in SECTIONS:
            continue
        if raw["format"] != FORMAT:
            raise UserError(
                f"{place}: has format {raw['format']!r}, known is {FORMAT}: measure it again"
            )
        yield place, raw


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (FILE:LINE, object) for every line, without a torn last one. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not text"
        raise UserError(f"{path}: {why}: name a JSONL file of `fgpt bench`") from error
    lines = text.split("\n")
    shape = "a records file has one object per line"
    for number, line in enumerate(lines, 1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and number > 1:  # no line end: the benchmark was killed
                return
            raise UserError(f"{place}: is not JSON: {shape}") from error
        if not isinstance(raw, dict):
            raise UserError(f"{place}: is not an object: {shape}")
        yield place, raw


def read_measurements(
    paths: Sequence[Path], kind: str, parse: Callable[[dict[str, Any]], Parsed]
) -> Iterator[Parsed]:
    """Every record of this `measurement`; other lines are ignored. Raises UserError."""
    for path in paths:
        for place, raw in read_objects(path):
            if raw.get("measurement") != kind:
                continue
            try:
                yield parse(raw)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                problem = f"lacks {error}" if isinstance(error, KeyError) else f"damaged: {error}"
                raise UserError(f"{place}: the record {problem} -> measure it again") from error


def _record(raw: dict[str, Any], hardware: str) -> Record:
    major, minor = raw["order"]
    return Record(
        bench=raw["bench"],
        workload=_text(raw["row"]),
        parameters=None if raw.get("parameters") is None else _count(raw["parameters"]),
        env_name=_text(raw["env_name"]),
        description=_text(raw.get("adds") or ""),
        section=_one_of(raw["section"], SECTIONS[raw["bench"]]),
        order=(int(major), int(minor)),
        reference=_text(raw["reference"]),
        state=_one_of(raw["state"], STATES),
        why=None if raw.get("why") is None else str(raw["why"]),
        hardware=_text(hardware),
        environment=_environment(raw.get("environment") or {}),
        measurement=_measurement(raw) if raw["state"] in ("measured", "wrong") else None,
    )


def _measurement(raw: dict[str, Any]) -> Measurement:
    ratio, memory = raw.get("ratio") or {}, raw["memory"]
    samples = _count(raw["global_batch"])
    train = _rounds(raw["train"], samples)
    if train is None:
        raise ValueError("no round of training")
    per_rank = memory.get("per_rank_bytes") or []
    memory_kind = str(memory["what"])
    return Measurement(
        ranks=_count(raw["ranks"]),
        grid=_text(raw["grid"]),
        batch=f"{samples} x {raw['seq_len']}, {raw['precision']}",
        seq_len=_count(raw["seq_len"]),
        train=train,
        predict=_rounds(raw.get("predict"), samples),
        train_ratio=_ratio(ratio.get("train")),
        predict_ratio=_ratio(ratio.get("predict")),
        memory_bytes=max(map(_count, (memory["peak_bytes"], *per_rank))),
        memory_kind=MEMORY_TEXTS.get(memory_kind, memory_kind),
        memory_ratio=_number(raw.get("ratio_memory")),
        loss_difference=_number(raw.get("loss_departure")),
        loss_bound=_number(raw.get("loss_bound")),
        flops_per_token=_number(raw.get("flops_per_token")),
        peak_tflops=_number(raw.get("peak_tflops")),
        peak_source=raw.get("peak_source"),
        breakdown=_numbers(raw.get("shares")),
        sent_bytes=_numbers(raw.get("sent_bytes")),
        trace=_numbers(raw.get("trace")),
    )


def _rounds(raw: dict[str, Any] | None, samples: int) -> Rounds | None:
    if not raw or not raw["round_s"]:
        return None
    seconds = tuple(_finite(value) for value in raw["round_s"])
    if min(seconds) <= 0:
        raise ValueError(f"rounds of {seconds} s")
    return Rounds(seconds, samples * _count(raw["batches"]))


def _ratio(raw: Iterable[float] | None) -> Ratio | None:
    if raw is None:
        return None
    median, low, high = map(_finite, raw)
    if min(median, low, high) <= 0:
        raise ValueError(f"ratios of {median}, {low}, {high}")
    return median, low, high


def _number(raw: Any) -> float | None:
    return None if raw is None else _finite(raw)


def _finite(raw: Any) -> float:
    value = float(raw)
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number")
    return value


def _count(raw: Any) -> int:
    number = int(raw)
    if not 1 <= number < 2**63:
        raise ValueError(f"{raw} is not a number of things")
    return number


def _text(raw: Any) -> str:
    """A name, as a table and a picture can show it."""
    if not isinstance(raw, str):
        raise TypeError(f"{raw!r} is not text")
    return printable(" ".join(raw.encode(errors="replace").decode().split()))


def _environment(raw: Any) -> dict[str, Any]:
    if not isinstance(raw.get("versions") or {}, dict) or not _are_texts(raw.get("command") or []):
        raise TypeError("environment's versions or command")
    return dict(raw)


def _are_texts(raw: Any) -> bool:
    return isinstance(raw, list) and all(isinstance(item, str) for item in raw)


def _numbers(raw: dict[str, float] | None) -> dict[str, float] | None:
    return None if raw is None else {str(key): float(value) for key, value in raw.items()}


def _one_of(value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return str(value)
