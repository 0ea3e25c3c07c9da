"""One span of a file -> its documents, by the file's suffix; memory bounded by one document.

    .txt .md .py   the whole file is one document, or one per `separator` (streamed)
    .jsonl         one object per line; the document is its `text_field`
    .parquet       one row per document; the document is column `text_field` (streamed by batches)

The first two also under .gz and .zst. A reader yields a Flaw for what the policy cannot mend (see
decode.py); the corpus decides about it. In text files a BOM at the start is dropped and CRLF
becomes LF; a lone CR is kept. The strings of .jsonl and .parquet are data and are kept as they
stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, BinaryIO

from fgpt.data.corpus import spans
from fgpt.data.corpus.decode import BOM, Document, Errors, Flaw, accept, decode, foreign
from fgpt.data.corpus.spans import Span, lines_before, open_binary, separator_pattern

MAX_DOCUMENT_BYTES = 256 * 2**20
CR = ord("\r")

Items = Iterator[Document | Flaw]


@dataclass(frozen=True)
class ReadOptions:
    """How files are cut into documents."""

    text_field: str = "text"
    """Name of the field (.jsonl) or column (.parquet) that holds the text."""
    separator: str | None = None
    """String between two documents of a text file; None: the whole file is one document."""
    document_start: str | None = None
    """Regular expression: a row that it matches begins a document; None: every row is one."""
    errors: Errors = "strict"
    """Policy for undecodable text (decode.py)."""


def _too_big() -> Flaw:
    limit = MAX_DOCUMENT_BYTES // 2**20
    return Flaw("", f"a document of more than {limit} MiB; cut it with document_separator")


def read_text(span: Span, options: ReadOptions) -> Items:
    """Documents of a .txt, .md or .py file."""
    if options.separator is None and span.end:
        yield from _read_whole(span, options)
        return
    with open_binary(span.path) as file:
        if (flaw := _at_start(file, span)) is not None:
            yield flaw
            return
        for place, raw in _cut(file, span, options.separator):
            yield _text(place, raw, span.source, options.errors)


def _read_whole(span: Span, options: ReadOptions) -> Items:
    """A file that is one document, unbuffered: there may be millions of small ones."""
    if span.end > MAX_DOCUMENT_BYTES:
        yield _too_big().at(span.source)
        return
    with open(span.path, "rb", buffering=0) as file:
        raw = file.readall()
    flaw = foreign(raw[:8])
    if flaw:
        yield flaw.at(span.source)
    else:
        yield _text(*_without_bom(0, raw), span.source, options.errors)


def _text(place: int, raw: bytes, source: str, errors: Errors) -> Document | Flaw:
    if len(raw) > MAX_DOCUMENT_BYTES:
        return _too_big().at(source)
    data = decode(raw, place, errors)
    if isinstance(data, Flaw):
        return data.at(source)
    # a single byte is looked for ten times as fast as two
    return Document(source, data.replace(b"\r\n", b"\n") if b"\r" in data else data)


def _at_start(file: BufferedReader, span: Span) -> Flaw | None:
    """Go to the span's first byte; what is wrong with the beginning of the file."""
    if span.start:
        file.seek(span.start)
        return None
    flaw = foreign(file.peek(8))
    return flaw and flaw.at(span.source)


def _cut(file: BinaryIO, span: Span, separator: str | None) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) between separators; holds one document and one chunk at a time.

    Of a document over MAX_DOCUMENT_BYTES, some bytes more than that.
    """
    offset, left = span.start, span.end - span.start if span.end else None
    held, searched = b"", 0
    if separator is None:
        yield _without_bom(0, file.read(MAX_DOCUMENT_BYTES + 1))
        return
    pattern = separator_pattern(separator)
    longest, lines = 2 * len(separator.encode()), separator.startswith("\n")
    begun = b""  # the beginning of a document that is too long; its rest is passed over
    while chunk := file.read(spans.CHUNK_BYTES if left is None else min(spans.CHUNK_BYTES, left)):
        left = None if left is None else left - len(chunk)
        held += chunk
        start = 0
        for match in pattern.finditer(held, max(0, searched - longest)):
            end = match.start()
            if lines and end > start and held[end - 1] == CR:
                end -= 1  # of the separator
            yield _without_bom(offset + start, begun or held[start:end])
            start, begun = match.end(), b""
        held, offset = held[start:], offset + start
        if len(held) > MAX_DOCUMENT_BYTES:
            begun = begun or held
            held, offset = held[-longest:], offset + len(held) - longest
        searched = len(held)
    yield _without_bom(offset, begun or held)


def _without_bom(offset: int, raw: bytes) -> tuple[int, bytes]:
    if offset == 0 and raw.startswith(BOM):
        return len(BOM), raw[len(BOM) :]
    return offset, raw


def read_jsonl(span: Span, options: ReadOptions) -> Items:
    """Documents of a .jsonl file: one JSON object per line; blank lines are passed over."""
    with open_binary(span.path) as file:
        if (flaw := _at_start(file, span)) is not None:
            yield flaw
            return
        offset, number = span.start, 0
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            if offset == 0 and line.startswith(BOM):
                line, offset = line[len(BOM) :], len(BOM)
            if not line.isspace():
                data = _json_line(line, offset, options)
                if isinstance(data, Flaw):
                    before = lines_before(span.path, span.start) if span.start else 0
                    yield data.at(f"{span.source}:{before + number}")
                else:
                    yield Document(span.source, data)
            offset += len(line)
            while len(line) > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                rest = file.readline(MAX_DOCUMENT_BYTES)  # of a line that is too long
                offset += len(rest)
                if rest.endswith(b"\n") or not rest:
                    break
            if offset == span.end:
                return


def _json_line(line: bytes, offset: int, options: ReadOptions) -> bytes | Flaw:
    if len(line) > MAX_DOCUMENT_BYTES:
        return _too_big()
    data = decode(line, offset, options.errors)
    if isinstance(data, Flaw):
        return data
    try:
        value = json.loads(data.decode())
    except json.JSONDecodeError as error:
        return Flaw(f":{error.colno}", f"not valid JSON ({error.msg})")
    except RecursionError:
        return Flaw("", "JSON nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return Flaw("", f"not valid JSON ({error})")
    if not isinstance(value, dict):
        return Flaw("", f"a JSON object is expected, found {type(value).__name__}")
    text = value.get(options.text_field)
    if isinstance(text, str):
        return accept(text, options.errors)
    if options.text_field not in value:
        return Flaw("", no_field("field", options.text_field, list(value)))
    return Flaw("", f'field "{options.text_field}" is {type(text).__name__}, not a string')


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
        big = len(value) > MAX_DOCUMENT_BYTES
        data = _too_big() if big else decode(value, 0, options.errors)
        if isinstance(data, Flaw):
            yield data.at(f"{source}: {noun} {row}")
        else:
            yield Document(source, data)


def joined(rows: Iterable[bytes], document_start: str) -> Iterator[bytes]:
    """Rows put together: one that matches `document_start` begins a document."""
    starts = re.compile(document_start).match
    held: list[bytes] = []
    size = 0
    for row in rows:
        if held and (starts(row.decode(errors="replace")) or size > MAX_DOCUMENT_BYTES):
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


def no_field(noun: str, name: str, present: list[str]) -> str:
    """The message for a missing field or column."""
    names = ", ".join(present[:20]) or "none"
    return f'no {noun} "{name}"; {noun}s present: {names}; set text_field'


READERS: dict[str, Callable[[Span, ReadOptions], Items]] = {
    ".txt": read_text,
    ".md": read_text,
    ".py": read_text,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
