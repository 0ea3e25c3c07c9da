"""Tables made of columns: a header and what it says of a record. Markdown is one form of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fgpt.report.cells import NONE, billions, name
from fgpt.report.records import Figures, Record


class Column(NamedTuple):
    """A header, and what stands under it for a record."""

    header: str
    cell: Callable[[Record], str]
    is_text: bool = False


def figure(header: str, cell: Callable[[Figures], str], is_text: bool = False) -> Column:
    """A column of something measured: a dash where it was not."""
    return Column(
        header, lambda record: NONE if record.figures is None else cell(record.figures), is_text
    )


def figure_or_state(header: str, cell: Callable[[Figures], str]) -> Column:
    """The column that says so where nothing was measured."""
    return Column(
        header, lambda record: record.state if record.figures is None else cell(record.figures)
    )


class Row(NamedTuple):
    """A line of a table."""

    cells: Sequence[str]
    state: str = "measured"


@dataclass(frozen=True)
class Table:
    """What is shown; the first column names the line."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Row]
    text_columns: frozenset[int] = frozenset({0})
    """Those that are no numbers."""
    notes: Sequence[str] = field(default=())
    """Sentences that stand under it."""

    def markdown(self) -> str:
        """The table alone, without title and notes."""
        marks = ["---" if i in self.text_columns else "--:" for i in range(len(self.headers))]
        rows = [self.headers, marks, *(_marked(row) for row in self.rows)]
        return "\n".join("| " + " | ".join(map(_escaped, cells)) + " |" for cells in rows)


def table_of(
    title: str,
    records: Sequence[Record],
    columns: Sequence[Column],
    notes: Sequence[str] = (),
) -> Table:
    """A line for each record; the first column must be text."""
    headers = [column.header for column in columns]
    texts = frozenset(i for i, column in enumerate(columns) if column.is_text)
    rows = [Row([column.cell(record) for column in columns], record.state) for record in records]
    return Table(title, headers, rows, texts, notes)


def identity(records: Iterable[Record], header: str = "Parameter Count (B)") -> list[Column]:
    """The two first columns; parameters that a record does not name are its model's."""
    known = {record.row: record.parameters for record in records if record.parameters}

    def parameters(record: Record) -> str:
        return billions(known[record.row]) if record.row in known else NONE

    return [Column("env_name", name, is_text=True), Column(header, parameters)]


def with_reference(group: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    """A table's records, after those that they are compared with and that stand elsewhere."""
    names = {(record.row, record.env_name) for record in group}
    wanted = {(record.row, record.reference) for record in group} - names
    bench, hardware, _ = group[0].table
    missing = [
        record
        for record in records
        if (record.row, record.env_name) in wanted and record.table[:2] == (bench, hardware)
    ]
    together: list[Record] = []
    for row in dict.fromkeys(record.row for record in group):
        together += [record for record in (*missing, *group) if record.row == row]
    return together


def _marked(row: Row) -> Sequence[str]:
    if row.state != "wrong":
        return row.cells
    return [f"**{row.cells[0]}**", *row.cells[1:]]


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")
