"""One file -> its documents, by the file's suffix; memory bounded by one document.

    .txt .md .py   the whole file is one document, or one per `separator` (streamed)
    .jsonl         one object per line; the document is its `text_field`
    .parquet       one row per document; the document is column `text_field` (streamed by batches)

A reader yields a Flaw for what the policy cannot mend (see decode.py); the corpus decides about it.
In text files a BOM at the start is dropped and CRLF becomes LF; a lone CR is kept. The strings of
.jsonl and .parquet are data and are kept as they stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.data.decode import BOM, Document, Errors, Flaw, accept, decode, foreign

MAX_DOCUMENT_BYTES = 256 * 2**20
CHUNK_BYTES = 2**20

Items = Iterator[Document | Flaw]


@dataclass(frozen=True)
class ReadOptions:
    """How files are cut into documents."""

    text_field: str = "text"
    """Name of the field (.jsonl) or column (.parquet) that holds the text."""
    separator: str | None = None
    """String between two documents of a text file; None: the whole file is one document."""
    errors: Errors = "strict"
    """Policy for undecodable text (decode.py)."""


def _too_big(source: str) -> Flaw:
    limit = MAX_DOCUMENT_BYTES // 2**20
    return Flaw(source, f"a document of more than {limit} MiB; cut it with document_separator")


def read_text(path: Path, source: str, options: ReadOptions) -> Items:
    """Documents of a .txt, .md or .py file."""
    with path.open("rb") as file:
        head = file.read(8)
        flaw = foreign(head, source)
        if flaw:
            yield flaw
            return
        file.seek(len(BOM) if head.startswith(BOM) else 0)
        for offset, raw in _cut(file, options.separator):
            if len(raw) > MAX_DOCUMENT_BYTES:
                yield _too_big(source)
                return
            item = decode(raw, source, offset, options.errors)
            if isinstance(item, Document) and "\r\n" in item.text:
                item = Document(source, item.text.replace("\r\n", "\n"))
            yield item


def _cut(file: Any, separator: str | None) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) between separators; holds one document and one chunk at a time."""
    offset = file.tell()
    if separator is None:
        yield offset, file.read(MAX_DOCUMENT_BYTES + 1)
        return
    # The file's line ends may be CRLF where the separator says LF.
    pattern = re.compile(re.escape(separator.encode()).replace(b"\\\n", b"\r?\n"))
    longest = 2 * len(separator.encode())
    held, searched = b"", 0
    while chunk := file.read(CHUNK_BYTES):
        held += chunk
        start = 0
        for match in pattern.finditer(held, max(0, searched - longest)):
            yield offset + start, held[start : match.start()]
            start = match.end()
        held, offset = held[start:], offset + start
        searched = len(held)
        if searched > MAX_DOCUMENT_BYTES:
            break
    yield offset, held


def read_jsonl(path: Path, source: str, options: ReadOptions) -> Items:
    """Documents of a .jsonl file: one JSON object per line; blank lines are passed over."""
    with path.open("rb") as file:
        number, offset = 0, 0
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            place = f"{source}:{number}"
            if number == 1:
                flaw = foreign(line, source)
                if flaw:
                    yield flaw
                    return
                line = line.removeprefix(BOM)
                offset = file.tell() - len(line)
            if len(line) > MAX_DOCUMENT_BYTES:
                yield _too_big(place)
                return
            if line.strip():
                yield _json_line(line, place, offset, options)
            offset = file.tell()


def _json_line(line: bytes, place: str, offset: int, options: ReadOptions) -> Document | Flaw:
    item = decode(line, place, offset, options.errors)
    if isinstance(item, Flaw):
        return item
    try:
        value = json.loads(item.text)
    except json.JSONDecodeError as error:
        return Flaw(f"{place}:{error.colno}", f"not valid JSON ({error.msg})")
    except RecursionError:
        return Flaw(place, "JSON nested too deeply")
    if not isinstance(value, dict):
        return Flaw(place, f"a JSON object is expected, found {type(value).__name__}")
    if options.text_field not in value:
        return Flaw(place, _no_field("field", options.text_field, list(value)))
    text = value[options.text_field]
    if not isinstance(text, str):
        return Flaw(place, f'field "{options.text_field}" is {type(text).__name__}, not a string')
    return accept(text, place, options.errors)


def read_parquet(path: Path, source: str, options: ReadOptions) -> Items:
    """Documents of a .parquet file: one per row; a null counts as an empty document."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            flaw = _column_flaw(file.schema_arrow, source, options.text_field)
            if flaw:
                yield flaw
                return
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[options.text_field]):
                # As bytes: pyarrow does not check that a string column is UTF-8.
                for value in batch.column(0).cast(pa.large_binary()):
                    row += 1
                    place = f"{source}: row {row}"
                    yield decode(value.as_py() or b"", place, 0, options.errors)
    except pa.ArrowException as error:
        yield Flaw(source, f"not a readable parquet file ({str(error).splitlines()[0]})")


def _column_flaw(schema: Any, source: str, column: str) -> Flaw | None:
    import pyarrow as pa

    if column not in schema.names:
        return Flaw(source, _no_field("column", column, schema.names))
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return Flaw(source, f'column "{column}" is {kind}, not a string')
    return None


def _no_field(noun: str, name: str, present: list[str]) -> str:
    names = ", ".join(present[:20]) or "none"
    return f'no {noun} "{name}"; {noun}s present: {names}; set text_field'


READERS: dict[str, Callable[[Path, str, ReadOptions], Items]] = {
    ".txt": read_text,
    ".md": read_text,
    ".py": read_text,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
