"""Readers of files, by suffix: one span -> its documents; memory bounded by one document.

    .txt .md .py   the file is one document, or one per `separator`, streamed
    .jsonl .json   one object per line; the document is its `text_field`; null is a blank document
    .parquet       one row per document; the document is column `text_field`, streamed

The first two rows also as .gz and .zst. A reader yields a MalformedDocument for everything that the
policy cannot repair (decode.py); the corpus raises or counts it. In text files a BOM at the start
is removed and CRLF becomes LF; a lone CR is kept. Strings of .jsonl and .parquet are not changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

from fgpt.data.recipe import Errors
from fgpt.prepare.sources.decode import (
    BOM,
    NON_TEXT_PREFIXES,
    DocumentBatch,
    MalformedDocument,
    are_valid,
    check_string,
    check_utf8,
    detect_binary_format,
)
from fgpt.prepare.sources.document_splitter import DocumentSplitter, remove_bom
from fgpt.prepare.sources.spans import Span, count_lines, open_binary, read_whole_file

MAX_DOCUMENT_BYTES = 256 * 2**20

ReaderOutput = Iterator[DocumentBatch | MalformedDocument]
TableRow = bytes | MalformedDocument | None


@dataclass(frozen=True)
class ReadOptions:
    """How files are divided into documents."""

    text_field: str = "text"  # field (.jsonl) or column (.parquet) of the text
    separator: str | None = None
    """Separator between documents of a text file; None: the file is one document."""
    document_start: str | None = None
    """Regular expression matching the first row of a document; None: each row is a document."""
    errors: Errors = "strict"  # policy for malformed documents (decode.py)


def _too_long() -> MalformedDocument:
    limit = MAX_DOCUMENT_BYTES // 2**20
    fix = "divide it with document_separator"
    return MalformedDocument("", f"a document of more than {limit} MiB; {fix}")


def read_plain_file(span: Span, errors: Errors) -> DocumentBatch | MalformedDocument:
    """Read an uncompressed text file that is one document, fast: there may be millions of them.

    Raises OSError; DataError if the file changed since it was listed.
    """
    if span.size_bytes > MAX_DOCUMENT_BYTES:
        return _too_long().within(span.source)
    data = read_whole_file(span)
    if b"\r" not in data and not data.startswith(NON_TEXT_PREFIXES) and are_valid((data,)):
        return DocumentBatch(span.source, [data])
    malformed = detect_binary_format(data)
    if malformed is not None:
        return malformed.within(span.source)
    return _check_text(*remove_bom(0, data), span.source, errors)


def read_text(span: Span, options: ReadOptions) -> ReaderOutput:
    """Yield the documents of a .txt, .md or .py file."""
    with open_binary(span.path) as file:
        if (malformed := _seek_to_span(file, span)) is not None:
            yield malformed
            return
        if options.separator is None:
            offset, raw = remove_bom(0, file.read(MAX_DOCUMENT_BYTES + 1))
            yield _check_text(offset, raw, span.source, options.errors)
            return
        splitter = DocumentSplitter(options.separator, span, MAX_DOCUMENT_BYTES)
        for offset, texts, gap in splitter.split(file):
            if gap and are_valid(texts):
                yield DocumentBatch(span.source, texts)
                continue
            for raw in texts:
                yield _check_text(offset, raw, span.source, options.errors)
                offset += len(raw) + gap


def _check_text(
    offset: int, raw: bytes, source: str, errors: Errors
) -> DocumentBatch | MalformedDocument:
    if len(raw) > MAX_DOCUMENT_BYTES:
        return _too_long().within(source)
    data = check_utf8(raw, offset, errors)
    if isinstance(data, MalformedDocument):
        return data.within(source)
    # searching one byte first is ten times as fast as searching two
    return DocumentBatch(source, [data.replace(b"\r\n", b"\n") if b"\r" in data else data])


def _seek_to_span(file: BufferedReader, span: Span) -> MalformedDocument | None:
    """Seek to the span; at the beginning of the file, detect binary formats instead."""
    if span.start:
        file.seek(span.start)
        return None
    malformed = detect_binary_format(file.peek(8))
    return malformed and malformed.within(span.source)


def read_jsonl(span: Span, options: ReadOptions) -> ReaderOutput:
    """Yield the documents of a .jsonl file: one JSON object per line; blank lines are ignored."""
    with open_binary(span.path) as file:
        if (malformed := _seek_to_span(file, span)) is not None:
            yield malformed
            return
        offset, number = span.start, 0
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            if offset == 0 and line.startswith(BOM):
                line, offset = line[len(BOM) :], len(BOM)
            if not line.isspace():
                data = _parse_line(line, offset, options)
                if isinstance(data, MalformedDocument):
                    before = count_lines(span.path, span.start) if span.start else 0
                    yield data.within(f"{span.source}:{before + number}")
                else:
                    yield DocumentBatch(span.source, [data])
            offset += len(line)
            while len(line) > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                rest = file.readline(MAX_DOCUMENT_BYTES)  # skip the rest of a line too long
                offset += len(rest)
                if rest.endswith(b"\n") or not rest:
                    break
            if offset == span.end:
                return


def has_json_line(path: str, text_field: str | None) -> bool:
    """Return whether a file's first line is a JSON object, with this field, or cannot be read."""
    try:
        with open_binary(path) as file:
            value = json.loads(file.readline(MAX_DOCUMENT_BYTES))
    except OSError:
        return True  # the reader will report the error
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and (text_field is None or text_field in value)


def _parse_line(line: bytes, offset: int, options: ReadOptions) -> bytes | MalformedDocument:
    if len(line) > MAX_DOCUMENT_BYTES:
        return _too_long()
    data = check_utf8(line, offset, options.errors)
    if isinstance(data, MalformedDocument):
        return data
    try:
        value = json.loads(data.decode())
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg}); one object per line is expected"
        return MalformedDocument(f":{error.colno}", problem)
    except RecursionError:
        return MalformedDocument("", "JSON nested too deeply")
    except ValueError as error:  # an integer with thousands of digits
        return MalformedDocument("", f"not valid JSON ({error})")
    if not isinstance(value, dict):
        found = f"expected one JSON object per line, found {type(value).__name__}"
        return MalformedDocument("", found)
    text = value.get(options.text_field, 0)
    if text is None:
        return b""
    if isinstance(text, str):
        return check_string(text, options.errors)
    if options.text_field not in value:
        missing = missing_field("field", options.text_field, list(value))
        return MalformedDocument("", f"{missing.problem}; --errors skip leaves such lines out")
    return MalformedDocument(
        "", f'field "{options.text_field}" is {type(text).__name__}, not a string'
    )


def missing_field(noun: str, name: str, present: list[str]) -> MalformedDocument:
    """A row without its field or column `name`."""
    names = ", ".join(present[:20]) or "none"
    fix = "name one with text_field (--text_field)"
    return MalformedDocument("", f'no {noun} "{name}"; {noun}s present: {names}; {fix}')


def read_parquet(span: Span, options: ReadOptions) -> ReaderOutput:
    """Yield the documents of a .parquet file: one per row; null is a blank document."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(span.path) as file:
            malformed = check_column(file.schema_arrow, options.text_field)
            if malformed:
                yield malformed.within(span.source)
                return
            groups = range(span.start, min(span.end, file.num_row_groups))
            before = sum(file.metadata.row_group(i).num_rows for i in range(span.start))
            column = [options.text_field]
            batches = file.iter_batches(batch_size=1024, columns=column, row_groups=list(groups))
            rows = (value for batch in batches for value in column_bytes(batch.column(0)))
            yield from read_rows(rows, span.source, before, options)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        yield MalformedDocument(span.source, f"not a readable parquet file ({reason})")


def check_column(schema: Any, column: str) -> MalformedDocument | None:
    """Return the problem of the text column in an Arrow schema, or None."""
    import pyarrow as pa

    if column not in schema.names:
        return missing_field("column", column, schema.names)
    kind = schema.field(column).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(values) for check in is_text):
        return MalformedDocument("", f'column "{column}" is {kind}, not a string')
    return None


def column_bytes(column: Any) -> list[bytes | None]:
    """Return the values of an Arrow string column as bytes: Arrow does not check their UTF-8."""
    import pyarrow as pa

    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values


def read_rows(
    rows: Iterable[TableRow],
    source: str,
    before: int,
    options: ReadOptions,
) -> ReaderOutput:
    """Yield the documents of a table's rows, numbered from `before` + 1 in messages.

    With `document_start`, rows are joined, and the documents are numbered.
    """
    noun = "row"
    if options.document_start is not None:
        noun = "document"
        rows = join_rows((row for row in rows if isinstance(row, bytes)), options.document_start)
    for number, value in enumerate(rows, before + 1):
        data = value or b""
        if isinstance(data, bytes):
            is_too_long = len(data) > MAX_DOCUMENT_BYTES
            data = _too_long() if is_too_long else check_utf8(data, 0, options.errors)
        if isinstance(data, MalformedDocument):
            yield data.within(f"{source}: {noun} {number}")
        else:
            yield DocumentBatch(source, [data])


def join_rows(rows: Iterable[bytes], document_start: str) -> Iterator[bytes]:
    """Join rows to documents: a row that matches `document_start` begins one.

    A line end comes between two rows, unless the first row with text ends in one: then the rows
    carry their own, as WikiText's do.
    """
    starts_document = re.compile(document_start).match
    pending: list[bytes] = []
    size = 0
    between: bytes | None = None
    for row in rows:
        if between is None and row:
            between = b"" if row.endswith(b"\n") else b"\n"
        starts = starts_document(row.decode(errors="replace"))
        if pending and (starts or size > MAX_DOCUMENT_BYTES):
            yield (between or b"").join(pending)
            pending, size = [], 0
        pending.append(row)
        size += len(row)
    if pending:
        yield (between or b"").join(pending)


READERS: dict[str, Callable[[Span, ReadOptions], ReaderOutput]] = {
    ".txt": read_text,
    ".md": read_text,
    ".py": read_text,
    ".jsonl": read_jsonl,
    ".json": read_jsonl,
    ".parquet": read_parquet,
}
PLAIN_SUFFIXES = tuple(suffix for suffix, reader in READERS.items() if reader is read_text)
"""Suffixes, in lower case, of the files that `read_plain_file` reads."""
