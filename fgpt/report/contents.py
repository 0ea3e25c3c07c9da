"""The whole report, before it is Markdown or HTML: parts with tables, pictures and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from fgpt.report import notes
from fgpt.report.bars import bars
from fgpt.report.canvas import Picture
from fgpt.report.compared import published_table, scaling_here
from fgpt.report.full import full_tables, not_measured
from fgpt.report.lines import ladder_lines, scaling_lines
from fgpt.report.records import Record
from fgpt.report.tables import Table

TITLE = "FGPT: measured speed and memory"


@dataclass(frozen=True)
class Share:
    """Where a step's time goes in one scenario."""

    title: str
    parts: dict[str, float]
    """Fractions of the time."""


@dataclass(frozen=True)
class Part:
    """A bench on one machine, or what stands beside them."""

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    rungs: Sequence[str] = ()
    """What each rung is."""
    shares: Sequence[Share] = field(default=())


def contents(records: Sequence[Record]) -> list[Part]:
    """Every part, GPUs first in each bench. `records`: in the report's order."""
    groups = groupby(records, key=lambda record: record.table[:2])
    parts = [_part(list(group)) for _, group in groups]
    missing = not_measured(records)
    last = [Part("Not measured", missing)] if missing else []
    scaling = Part("Two cards and one", scaling_here(records), [published_table(times=True)])
    return [*parts, scaling, *last]


def _part(records: list[Record]) -> Part:
    bench, hardware, _ = records[0].table
    line = ladder_lines(records) if bench == "single" else scaling_lines(records)
    rows = dict.fromkeys(record.row for record in records if record.figures)
    bar_charts = [bars([record for record in records if record.row == row]) for row in rows]
    return Part(
        title=f"{bench}: {hardware}",
        tables=full_tables(records),
        pictures=[*([line] if line else []), *bar_charts],
        rungs=notes.added(records),
        shares=_shares(records),
    )


def _shares(records: Sequence[Record]) -> list[Share]:
    """Traced kernels, and in the multi bench the parts of a step."""
    shares = []
    for record in records:
        if record.figures is None:
            continue
        title = f"{record.row}, {record.env_name}"
        for kind, parts in (("kernels", record.figures.trace), ("step", record.figures.shares)):
            if parts:
                shares.append(Share(f"{title}: {kind}", parts))
    return shares


def markdown(parts: Sequence[Part]) -> str:
    """The report as table.md: tables, sentences, and links to the pictures beside it."""
    lines = [f"# {TITLE}"]
    for part in parts:
        lines += [f"## {part.title}", *part.texts]
        for table in part.tables:
            lines += [f"### {table.title}", table.markdown(), *table.notes]
        lines += [f"![{picture.alt}]({picture.name})" for picture in part.pictures]
        if part.rungs:
            lines += ["### What each rung is", "\n".join(f"- {rung}" for rung in part.rungs)]
    return "\n\n".join(lines) + "\n"
