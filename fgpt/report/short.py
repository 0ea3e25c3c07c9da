"""The README's tables: few columns, each under a name that a marker asks for."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from fgpt.report import cells, notes
from fgpt.report.compared import explanation, published_table, scaling_here
from fgpt.report.full import TITLES, efficiency
from fgpt.report.records import Record
from fgpt.report.tables import (
    Column,
    figure,
    identity,
    table_of,
    with_reference,
)

WIDTH = 108
SEEDS = (
    figure("train SPS", lambda f: cells.number(f.train.samples_per_s)),
    figure("predict SPS", cells.prediction_sps),
    figure("GB", lambda f: cells.gigabytes(f.memory_bytes)),
)
TIMES = (
    *SEEDS,
    figure("x train", lambda f: cells.times(f.train_ratio)),
    figure("x predict", lambda f: cells.times(f.predict_ratio)),
    figure("x memory", lambda f: cells.percent(f.memory_ratio)),
)


def _single(section: str) -> Callable[[Sequence[Record]], str]:
    return lambda records: _section(records, section)


def _section(records: Sequence[Record], section: str, title: str | None = None) -> str:
    tables = _tables(records, "single", section, TIMES, title)
    return "\n\n".join([*tables, *_missing(records, "single", section)])


def _best(records: Sequence[Record]) -> str:
    """Each model's reference and its fastest rung, of every machine."""
    ladder = [record for record in records if record.section == "ladder"]
    chosen = []
    for _, group in groupby(ladder, key=lambda record: (record.hardware, record.row)):
        chosen += _ends(list(group))
    return _section(chosen, "ladder", "The ladder's foot, and its fastest rung")


def _ends(group: Sequence[Record]) -> list[Record]:
    measured = [record for record in group if record.state == "measured"]
    first = [record for record in measured if record.env_name == record.reference]
    fastest = max(measured, key=_speed, default=None)
    return [*first, *([fastest] if fastest and fastest not in first else [])]


def _speed(record: Record) -> float:
    return record.figures.train.samples_per_s if record.figures else 0.0


def _layouts(records: Sequence[Record]) -> str:
    sent = figure("MB sent per step", cells.sent, is_text=True)
    tables = _tables(records, "multi", "layouts", [*_ranks(records), sent])
    return "\n\n".join([*tables, *_missing(records, "multi", "layouts")])


def _scaling(records: Sequence[Record]) -> str:
    columns = _ranks(records)
    strong, weak = (_tables(records, "multi", name, columns) for name in ("strong", "weak"))
    return "\n\n".join([*strong, *weak, *map(_wrapped, scaling_here(records))])


def _published(records: Sequence[Record]) -> str:
    table = published_table(times=False)
    return f"{table.markdown()}\n\n{_wrapped(explanation())}"


GENERATORS: Mapping[str, Callable[[Sequence[Record]], str]] = {
    "single": _single("ladder"),
    "best": _best,
    "memory": _single("memory"),
    "compare": _single("compare"),
    "multi": _layouts,
    "scaling": _scaling,
    "published": _published,
}
"""What stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`, by NAME."""


def _ranks(records: Sequence[Record]) -> list[Column]:
    return [
        figure("ranks", lambda f: str(f.ranks)),
        *SEEDS,
        figure("x 1 rank", lambda f: cells.times(f.train_ratio)),
        Column("efficiency", lambda record: cells.percent(efficiency(record, records))),
    ]


def _tables(
    records: Sequence[Record],
    bench: str,
    section: str,
    columns: Sequence[Column],
    title: str | None = None,
) -> list[str]:
    """A table for each machine that measured one of these scenarios."""
    chosen = [record for record in records if (record.bench, record.section) == (bench, section)]
    groups = [list(group) for _, group in groupby(chosen, key=lambda record: record.hardware)]
    return [
        _one(title or TITLES[section], group, records, columns)
        for group in groups
        if any(record.figures for record in group)
    ]


def _one(
    title: str, group: Sequence[Record], records: Sequence[Record], columns: Sequence[Column]
) -> str:
    lines = with_reference(group, records)
    measured = [record for record in lines if record.figures]
    table = table_of(title, measured, [*identity(records, "Parameters (B)"), *columns])
    texts = [_units(measured, group), *notes.states(lines)]
    return "\n\n".join([f"{title} ({group[0].hardware}):", table.markdown(), *map(_wrapped, texts)])


def _missing(records: Sequence[Record], bench: str, section: str) -> list[str]:
    measured = [
        record
        for record in records
        if (record.bench, record.section) == (bench, section) and record.figures
    ]
    if not measured:
        return ["Not measured."]
    return [] if any(record.on_gpu for record in measured) else ["GPU: not measured."]


def _units(measured: Sequence[Record], group: Sequence[Record]) -> str:
    references = ", ".join(dict.fromkeys(record.reference for record in group))
    tokens: dict[int, list[str]] = {}
    for record in measured:
        rows = tokens.setdefault(record.figures.seq_len, []) if record.figures else []
        if record.row not in rows:
            rows.append(record.row)
    samples = "; ".join(f"{n} tokens ({', '.join(rows)})" for n, rows in tokens.items())
    what = ", ".join(dict.fromkeys(r.figures.memory_what for r in measured if r.figures))
    return (
        f"SPS: samples per second, median over the rounds; a sample has {samples}. GB: 2^30 bytes,"
        f" {what}. x: relative to {references}: median of the rounds' ratios (lowest-highest)."
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
