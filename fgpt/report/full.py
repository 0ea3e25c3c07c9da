"""The whole report's tables: one for each bench, hardware and section."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from fgpt.report import cells, notes
from fgpt.report.records import SECTIONS, Figures, Record
from fgpt.report.tables import (
    Column,
    Table,
    figure,
    figure_or_state,
    identity,
    table_of,
    with_reference,
)

TITLES = {
    "ladder": "The ladder: each rung adds one thing",
    "memory": "Memory",
    "compare": "Beside a bare loop and other trainers",
    "layouts": "Layouts",
    "strong": "Strong scaling: the same batch over more ranks",
    "weak": "Weak scaling: a batch that grows with the ranks",
}
SEEDS = (
    figure_or_state("Training Time (ms)", cells.training_ms),
    figure("Training Throughput (SPS)", lambda f: cells.number(f.train.samples_per_s)),
    figure("Prediction Time (ms)", cells.prediction_ms),
    figure("Prediction Throughput (SPS)", cells.prediction_sps),
    figure("Memory Usage (GB)", lambda f: cells.gigabytes(f.memory_bytes)),
)
"""The published tables' columns, after env_name and Parameter Count (B)."""
EXTRA = (
    Column("model", lambda record: record.row, is_text=True),
    figure("batch, number format", lambda f: f.batch, is_text=True),
    figure("tokens/s", lambda f: f"{f.tokens_per_s:,.0f}"),
    figure("MFU", lambda f: cells.percent(f.mfu)),
)
LOSS = figure("loss departs by", cells.departure)


def full_tables(records: Sequence[Record]) -> list[Table]:
    """Every table that the records can fill. `records`: in the report's order."""
    return [
        _table(list(group), records)
        for _, group in groupby(records, key=lambda record: record.table)
    ]


def not_measured(records: Sequence[Record]) -> list[str]:
    """One line for each table that nobody measured."""
    lines = []
    for bench, sections in SECTIONS.items():
        here = [record for record in records if record.bench == bench and record.figures]
        if not any(record.on_gpu for record in here):
            lines.append(f"{bench}, GPU: not measured (no record's hardware is a GPU).")
        if not here:
            lines.append(f"{bench}, CPU: not measured.")
            continue
        present = {record.section for record in here}
        lines += [
            f"{bench}, {section}: not measured." for section in sections if section not in present
        ]
    return lines


def _table(group: Sequence[Record], records: Sequence[Record]) -> Table:
    bench, hardware, section = group[0].table
    lines = with_reference(group, records)
    columns = [*identity(records), *SEEDS, *EXTRA, *_ratios(group)]
    texts = notes.notes_of(lines)
    if bench == "multi":
        columns += _ranks(records)
        texts = [notes.UNITS, notes.EFFICIENCY, notes.SENT, *texts[1:]]
    title = f"{TITLES[section]} ({bench}, {hardware})"
    return table_of(title, lines, [*columns, LOSS], texts)


def _ratios(group: Sequence[Record]) -> list[Column]:
    references = {record.reference for record in group}
    against = references.pop() if len(references) == 1 else "reference"
    return [
        figure(f"training, times {against}", lambda f: cells.times(f.train_ratio)),
        figure(f"prediction, times {against}", lambda f: cells.times(f.predict_ratio)),
        figure(f"memory against {against}", lambda f: cells.percent(f.memory_ratio)),
    ]


def _ranks(records: Sequence[Record]) -> list[Column]:
    parts = {
        "compute": "computing",
        "communication": "communicating",
        "pipeline": "pipeline",
        "data": "waiting for data",
    }
    return [
        figure("ranks", lambda f: str(f.ranks)),
        figure("grid", lambda f: f.grid, is_text=True),
        figure("memory per rank, largest (GB)", lambda f: cells.gigabytes(f.memory_bytes)),
        figure("MB sent per step", cells.sent, is_text=True),
        *(figure(header, _share(name)) for name, header in parts.items()),
        Column("efficiency", lambda record: cells.percent(efficiency(record, records))),
    ]


def _share(name: str) -> Callable[[Figures], str]:
    return lambda figures: cells.share(figures, name)


def efficiency(record: Record, records: Sequence[Record]) -> float | None:
    """Total work per second against one rank: per GPU; on a CPU, as it is (its ranks share cores).

    None if it was not compared with one rank.
    """
    figures = record.figures
    if figures is None or figures.train_ratio is None:
        return None
    for other in records:
        if (other.bench, other.row, other.env_name, other.hardware) == (
            record.bench, record.row, record.reference, record.hardware,
        ):  # fmt: skip
            if other.figures is None or other.figures.ranks != 1:
                return None
            return figures.train_ratio[0] / (figures.ranks if record.on_gpu else 1)
    return None
