"""Reading the records of `fgpt bench single` and `fgpt bench multi`: JSON lines, strictly.

Other benches' lines in the same files are left out. Of several lines about the same scenario on the
same hardware the last one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fgpt.errors import UserError
from fgpt.report.records import NO_HARDWARE, SECTIONS, STATES, Figures, Record, Rounds

FORMAT = 1
SHAPE = "a file of records has one object a line"


def read_records(paths: Sequence[Path], *, each: bool) -> list[Record]:
    """The latest record of every scenario, in the order of the report (GPUs first).

    `each`: a file without any record is a fault. Raises UserError.
    """
    latest: dict[tuple[str, str, str, str], Record] = {}
    for path in paths:
        records = _read_file(path)
        if each and not records:
            raise UserError(
                f"{path}: holds no record of `fgpt bench single` or `multi`: name a file they wrote"
            )
        for record in records:
            of = (record.bench, record.row, record.env_name, record.hardware)
            # what was skipped or failed later does not undo what was measured
            if record.figures is not None or of not in latest or latest[of].figures is None:
                latest[of] = record
    return sorted(latest.values(), key=_place)


def _place(record: Record) -> tuple[object, ...]:
    sections = SECTIONS[record.bench]
    return (
        list(SECTIONS).index(record.bench),
        not record.on_gpu,
        record.hardware,
        sections.index(record.section),
        record.order,
    )


def _read_file(path: Path) -> list[Record]:
    lines = list(_lines(path))
    named = [name for _, raw in lines if (name := _hardware(raw))]
    hardware = named[0] if named else NO_HARDWARE
    records = []
    for where, raw in lines:
        # a scenario that was skipped may say nothing of its machine: it is the one before it
        hardware = _hardware(raw) or hardware
        try:
            records.append(_record(raw, hardware))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged: {error}"
            raise UserError(f"{where}: the record {what} -> measure it again") from error
    return records


def _hardware(raw: dict[str, Any]) -> str | None:
    environment = raw.get("environment")
    return environment.get("hardware") if isinstance(environment, dict) else None


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of the lines of the two benches; a torn last one is left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not text"
        raise UserError(f"{path}: {why}: name a JSONL file of `fgpt bench`") from error
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except ValueError as error:
            if number == len(lines) and number > 1:  # without its line end: a killed bench
                return
            raise UserError(
                f"{where}: is not JSON: a records file has one object a line"
            ) from error
        if not isinstance(raw, dict):
            raise UserError(f"{where}: is not an object: a records file has one object a line")
        if "format" not in raw or raw.get("bench") not in SECTIONS:
            continue
        if raw["format"] != FORMAT:
            raise UserError(
                f"{where}: has format {raw['format']!r}, known is {FORMAT}: measure it again"
            )
        yield where, raw


def _record(raw: dict[str, Any], hardware: str) -> Record:
    row_number, rung_number = raw["order"]
    return Record(
        bench=raw["bench"],
        row=str(raw["row"]),
        parameters=None if raw.get("parameters") is None else int(raw["parameters"]),
        env_name=str(raw["env_name"]),
        adds=str(raw.get("adds") or ""),
        section=_one_of(raw["section"], SECTIONS[raw["bench"]]),
        order=(int(row_number), int(rung_number)),
        reference=str(raw["reference"]),
        state=_one_of(raw["state"], STATES),
        why=None if raw.get("why") is None else str(raw["why"]),
        hardware=str(hardware),
        origin=dict(raw.get("environment") or {}),
        figures=_figures(raw) if raw["state"] in ("measured", "wrong") else None,
    )


def _figures(raw: dict[str, Any]) -> Figures:
    ratio, memory = raw.get("ratio") or {}, raw["memory"]
    samples = int(raw["global_batch"])
    train = _rounds(raw["train"], samples)
    if train is None:
        raise ValueError("no round of training")
    per_rank = memory.get("per_rank_bytes") or []
    return Figures(
        ranks=int(raw["ranks"]),
        grid=str(raw["grid"]),
        batch=f"{samples} x {raw['seq_len']}, {raw['precision']}",
        seq_len=int(raw["seq_len"]),
        train=train,
        predict=_rounds(raw.get("predict"), samples),
        train_ratio=_ratio(ratio.get("train")),
        predict_ratio=_ratio(ratio.get("predict")),
        memory_bytes=max(int(memory["peak_bytes"]), *map(int, per_rank), 0),
        memory_what=str(memory["what"]),
        memory_ratio=_number(raw.get("ratio_memory")),
        loss_departure=_number(raw.get("loss_departure")),
        loss_bound=_number(raw.get("loss_bound")),
        flops_per_token=_number(raw.get("flops_per_token")),
        peak_tflops=_number(raw.get("peak_tflops")),
        peak_source=raw.get("peak_source"),
        shares=_shares(raw.get("shares")),
        sent_bytes=_shares(raw.get("sent_bytes")),
        trace=_shares(raw.get("trace")),
    )


def _rounds(raw: dict[str, Any] | None, samples: int) -> Rounds | None:
    if not raw or not raw["round_s"]:
        return None
    seconds = tuple(float(value) for value in raw["round_s"])
    if min(seconds) <= 0 or int(raw["batches"]) < 1:
        raise ValueError(f"rounds of {seconds} s, {raw['batches']} batches")
    return Rounds(seconds, samples * int(raw["batches"]))


def _ratio(raw: Iterable[float] | None) -> tuple[float, float, float] | None:
    if raw is None:
        return None
    median, low, high = map(float, raw)
    return median, low, high


def _number(raw: Any) -> float | None:
    return None if raw is None else float(raw)


def _shares(raw: dict[str, float] | None) -> dict[str, float] | None:
    return None if raw is None else {str(key): float(value) for key, value in raw.items()}


def _one_of(value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return str(value)
