"""One span of a file of text or JSON lines -> its documents; memory bounded by one document.

A reader yields a Flaw for what the policy cannot mend (see decode.py); the corpus decides about it.
In text files a BOM at the start is dropped and CRLF becomes LF; a lone CR is kept. The strings of
.jsonl are data and are kept as they stand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader

from fgpt.data.recipe import Errors
from fgpt.prepare.sources.decode import (
    BOM,
    ODD_HEADS,
    Flaw,
    Texts,
    accept,
    are_sound,
    decode,
    foreign,
)
from fgpt.prepare.sources.document_splitter import Cutter, without_bom
from fgpt.prepare.sources.spans import Span, lines_before, open_binary, read_bytes

MAX_DOCUMENT_BYTES = 256 * 2**20

Items = Iterator[Texts | Flaw]


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


def too_big() -> Flaw:
    """A document of more than MAX_DOCUMENT_BYTES: a flaw under every policy."""
    limit = MAX_DOCUMENT_BYTES // 2**20
    return Flaw("", f"a document of more than {limit} MiB; cut it with document_separator")


def read_file(span: Span, errors: Errors) -> Texts | Flaw:
    """An uncompressed text file that is one document, in few steps: there may be millions of them.

    Raises OSError; DataError if it is not the file that was listed.
    """
    if span.size_bytes > MAX_DOCUMENT_BYTES:
        return too_big().at(span.source)
    data = read_bytes(span)
    if b"\r" not in data and not data.startswith(ODD_HEADS) and are_sound((data,)):
        return Texts(span.source, [data])
    flaw = foreign(data)
    if flaw is not None:
        return flaw.at(span.source)
    return _text(*without_bom(0, data), span.source, errors)


def read_text(span: Span, options: ReadOptions) -> Items:
    """Documents of a .txt, .md or .py file."""
    with open_binary(span.path) as file:
        if (flaw := _at_start(file, span)) is not None:
            yield flaw
            return
        if options.separator is None:
            place, raw = without_bom(0, file.read(MAX_DOCUMENT_BYTES + 1))
            yield _text(place, raw, span.source, options.errors)
            return
        for place, some, gap in Cutter(options.separator, span, MAX_DOCUMENT_BYTES).cut(file):
            if gap and are_sound(some):
                yield Texts(span.source, some)
                continue
            for raw in some:
                yield _text(place, raw, span.source, options.errors)
                place += len(raw) + gap


def _text(place: int, raw: bytes, source: str, errors: Errors) -> Texts | Flaw:
    if len(raw) > MAX_DOCUMENT_BYTES:
        return too_big().at(source)
    data = decode(raw, place, errors)
    if isinstance(data, Flaw):
        return data.at(source)
    # a single byte is looked for ten times as fast as two
    return Texts(source, [data.replace(b"\r\n", b"\n") if b"\r" in data else data])


def _at_start(file: BufferedReader, span: Span) -> Flaw | None:
    """Go to the span's first byte; what is wrong with the beginning of the file."""
    if span.start:
        file.seek(span.start)
        return None
    flaw = foreign(file.peek(8))
    return flaw and flaw.at(span.source)


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
                    yield Texts(span.source, [data])
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
        return too_big()
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


def no_field(noun: str, name: str, present: list[str]) -> str:
    """The message for a missing field or column."""
    names = ", ".join(present[:20]) or "none"
    return f'no {noun} "{name}"; {noun}s present: {names}; set text_field'
