"""Tables of records: columns, text of a cell, Markdown. An unknown value is a dash."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fgpt.report.records import Measurement, Ratio, Record

NONE = "-"
SAMPLES = 500
"""Times are shown for this number of samples."""
GIB = 2**30
WIDTH = 108
"""Of the text under a README's table, in characters."""


class Column(NamedTuple):
    """A header, and the text of its cell for a record."""

    header: str
    cell: Callable[[Record], str]
    is_text: bool = False


class TableRow(NamedTuple):
    """The cells of a row, and the record's state."""

    cells: Sequence[str]
    state: str


@dataclass(frozen=True)
class Table:
    """Title, cells, and the notes below; the first column names the row."""

    title: str
    headers: Sequence[str]
    rows: Sequence[TableRow]
    text_columns: frozenset[int]
    """Indices of the columns that do not hold numbers."""
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table alone, without title and notes."""
        marks = ["---" if i in self.text_columns else "--:" for i in range(len(self.headers))]
        rows = [self.headers, marks, *map(_emphasized, self.rows)]
        return "\n".join("| " + " | ".join(map(_escaped, cells)) + " |" for cells in rows)


def with_notes(table: Table) -> list[str]:
    """The paragraphs of a README: title, table, and its notes."""
    notes = (
        textwrap.fill(note, WIDTH, break_long_words=False, break_on_hyphens=False)
        for note in table.notes
    )
    return [f"{table.title}:", table.markdown(), *notes]


def _emphasized(row: TableRow) -> Sequence[str]:
    return [f"**{row.cells[0]}**", *row.cells[1:]] if row.state == "wrong" else row.cells


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def make_table(
    title: str, records: Sequence[Record], columns: Sequence[Column], notes: Sequence[str] = ()
) -> Table:
    """A row for each record; the first column must be text."""
    headers = [column.header for column in columns]
    text_columns = frozenset(i for i, column in enumerate(columns) if column.is_text)
    rows = [
        TableRow([column.cell(record) for column in columns], record.state) for record in records
    ]
    return Table(title, headers, rows, text_columns, notes)


def measured(
    header: str, cell: Callable[[Measurement], str], is_text: bool = False, or_state: bool = False
) -> Column:
    """A column of measured values; without a measurement the record's state, or a dash."""

    def text(record: Record) -> str:
        if record.measurement is None:
            return record.state if or_state else NONE
        return cell(record.measurement)

    return Column(header, text, is_text)


def identity_columns(
    records: Iterable[Record], header: str = "Parameter Count (B)"
) -> list[Column]:
    """The first two columns; a record without a parameter count shows that of its workload."""
    known = {record.workload: record.parameters for record in records if record.parameters}

    def parameters(record: Record) -> str:
        return billions(known[record.workload]) if record.workload in known else NONE

    return [Column("env_name", display_name, is_text=True), Column(header, parameters)]


def with_references(group: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    """A table's records by workload, each after the references that are in another table."""
    names = {(record.workload, record.env_name) for record in group}
    wanted = {(record.workload, record.reference) for record in group} - names
    missing = [
        record
        for record in records
        if (record.workload, record.env_name) in wanted and record.table[:2] == group[0].table[:2]
    ]
    ordered: list[Record] = []
    for workload in dict.fromkeys(record.workload for record in group):
        ordered += [record for record in (*missing, *group) if record.workload == workload]
    return ordered


def display_name(record: Record) -> str:
    """The variant's name, marked if its losses are wrong: it does not compute the same thing."""
    return f"{record.env_name} (WRONG)" if record.state == "wrong" else record.env_name


def number(value: float) -> str:
    """About four significant digits."""
    if value >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def billions(parameters: float) -> str:
    """Parameters in units of 10^9, to three places; smaller models keep one digit."""
    text = f"{parameters / 1e9:.3f}"
    return text if float(text) else f"{parameters / 1e9:.1g}"


def gigabytes(n_bytes: float) -> str:
    """Bytes in units of 2^30."""
    return f"{n_bytes / GIB:.3f}"


def percent(fraction: float | None) -> str:
    """A fraction as a percentage."""
    return NONE if fraction is None else f"{100 * fraction:.1f}%"


def ratio(value: Ratio | None) -> str:
    """Median (lowest-highest round)."""
    return NONE if value is None else "{:.2f} ({:.2f}-{:.2f})".format(*value)


def prediction_sps(measurement: Measurement) -> str:
    """Samples per second of prediction."""
    return NONE if measurement.predict is None else number(measurement.predict.samples_per_s)


def sent(measurement: Measurement) -> str:
    """MB (10^6 bytes) sent per step by kind of process group, without kinds that send nothing."""
    if measurement.sent_bytes is None:
        return NONE
    kinds = [f"{kind} {n / 1e6:.3g}" for kind, n in measurement.sent_bytes.items() if n]
    return ", ".join(kinds) or "nothing"
