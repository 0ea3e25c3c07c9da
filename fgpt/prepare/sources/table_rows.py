"""The rows of a table -> its documents: .parquet files and data sets.

A row is a document, its text what is in the column `text_field`; the strings are data and are kept
as they stand. With `document_start` rows are lines, and are joined to documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from fgpt.prepare.sources import readers
from fgpt.prepare.sources.decode import Flaw, Texts, decode
from fgpt.prepare.sources.readers import Items, ReadOptions, no_field, too_big
from fgpt.prepare.sources.spans import Span


def read_parquet(span: Span, options: ReadOptions) -> Items:
    """Documents of a .parquet file: one per row; a null counts as an empty document."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(span.path) as file:
            flaw = column_flaw(file.schema_arrow, options.text_field)
            if flaw:
                yield flaw.at(span.source)
                return
            groups = range(span.start, min(span.end, file.num_row_groups))
            before = sum(file.metadata.row_group(i).num_rows for i in range(span.start))
            column = [options.text_field]
            batches = file.iter_batches(batch_size=1024, columns=column, row_groups=list(groups))
            rows = (value for batch in batches for value in as_bytes(batch.column(0)))
            yield from read_rows(rows, span.source, before, options)
    except pa.ArrowException as error:
        yield Flaw(span.source, f"not a readable parquet file ({str(error).splitlines()[0]})")


def as_bytes(column: Any) -> list[bytes | None]:
    """The values of an Arrow string column; as bytes, for nobody checks that they are UTF-8."""
    import pyarrow as pa

    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values


def read_rows(
    rows: Iterable[bytes | Flaw | None], source: str, before: int, options: ReadOptions
) -> Items:
    """Documents of a table's rows, numbered from `before` + 1; flaws are passed on.

    With `document_start` the rows are joined, and the documents are numbered.
    """
    noun = "row"
    if options.document_start is not None:
        noun = "document"
        rows = joined((row for row in rows if isinstance(row, bytes)), options.document_start)
    for row, value in enumerate(rows, before + 1):
        value = value or b""
        if isinstance(value, Flaw):
            yield value.at(f"{source}: {noun} {row}")
            continue
        big = len(value) > readers.MAX_DOCUMENT_BYTES
        data = too_big() if big else decode(value, 0, options.errors)
        if isinstance(data, Flaw):
            yield data.at(f"{source}: {noun} {row}")
        else:
            yield Texts(source, [data])


def joined(rows: Iterable[bytes], document_start: str) -> Iterator[bytes]:
    """Rows put together: one that matches `document_start` begins a document."""
    starts = re.compile(document_start).match
    held: list[bytes] = []
    size = 0
    for row in rows:
        if held and (starts(row.decode(errors="replace")) or size > readers.MAX_DOCUMENT_BYTES):
            yield b"".join(held)
            held, size = [], 0
        held.append(row)
        size += len(row)
    if held:
        yield b"".join(held)


def column_flaw(schema: Any, column: str) -> Flaw | None:
    """What is wrong with the text column of an Arrow schema."""
    import pyarrow as pa

    if column not in schema.names:
        return Flaw("", no_field("column", column, schema.names))
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return Flaw("", f'column "{column}" is {kind}, not a string')
    return None
