"""Every input gives documents, counted skips, or a one-line error."""

from __future__ import annotations

import errno
import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fgpt.data.recipe import Errors, SourceSpec
from fgpt.errors import DataError
from fgpt.prepare.sources import readers, spans
from fgpt.prepare.sources.corpus import ReadStats, RetryableError, read_documents
from fgpt.prepare.sources.open_corpus import open_corpus


def texts(path: Path, errors: Errors = "strict", **spec: str) -> list[str]:
    corpus = open_corpus(SourceSpec("local", str(path), **spec), errors)
    return [document.text for document in read_documents(corpus, ReadStats())]


def tally(path: Path, errors: Errors = "skip") -> ReadStats:
    count = ReadStats()
    list(read_documents(open_corpus(SourceSpec("local", str(path)), errors), count))
    return count


def put(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def test_every_format_through_one_face(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", b"one")
    put(tmp_path, "b.md", b"two")
    put(tmp_path, "c.py", b"three")
    put(tmp_path, "d.jsonl", b'{"text": "four"}\n\n{"text": "five"}')
    pq.write_table(pa.table({"text": ["six", "seven"], "n": [1, 2]}), tmp_path / "e.parquet")
    put(tmp_path, "f.bin", b"\0")
    (tmp_path / "sub").mkdir()
    put(tmp_path / "sub", "g.TXT", b"eight")
    put(tmp_path, ".hidden.txt", b"no")
    assert texts(tmp_path) == ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def test_order_does_not_depend_on_the_order_of_creation(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.txt"):
        put(tmp_path, name, name.encode())
    assert texts(tmp_path) == ["a.txt", "b.txt", "c.txt"]


def test_bom_and_crlf(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    put(tmp_path, "b.jsonl", b'\xef\xbb\xbf{"text": "x\\r\\ny"}\r\n{"text": "z"}\r\n')
    assert texts(tmp_path) == ["one\ntwo\rthree\n", "x\r\ny", "z"]


def test_text_field_and_null_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x", None, ""]}), tmp_path / "a.parquet")
    put(tmp_path, "b.jsonl", b'{"body": "y", "text": "no"}')
    assert texts(tmp_path, text_field="body") == ["x", "y"]


def test_parquet_row_groups_are_streamed(tmp_path: Path) -> None:
    values = [f"row {i}" for i in range(5000)]
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet", row_group_size=700)
    assert texts(tmp_path) == values


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**20])
def test_separator_is_found_at_every_chunk_edge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(spans, "CHUNK_BYTES", chunk)
    data = "\ufeffzw\u00f6lf\n\nboxk\u00e4mpfer\r\n\r\njagen\n\n\n\n\u4e2d\u6587\nzwei".encode()
    path = put(tmp_path, "a.txt", data)
    expected = ["zw\u00f6lf", "boxk\u00e4mpfer", "jagen", "\u4e2d\u6587\nzwei"]
    assert texts(path, document_separator="\n\n") == expected


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.text(alphabet="a\u00e9\n <|>", max_size=6), max_size=6), st.integers(1, 9))
def test_streamed_cutting_equals_str_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[str], chunk: int
) -> None:
    monkeypatch.setattr(spans, "CHUNK_BYTES", chunk)
    text = "<||>".join(parts)
    path = put(tmp_path, "a.txt", text.encode())
    expected = [part for part in text.split("<||>") if part.strip()]
    assert texts(path, document_separator="<||>") == expected


BAD = {
    "latin-1": ("a.txt", b"caf\xe9 au lait", "a.txt: byte 3: not UTF-8"),
    "truncated UTF-8": ("a.txt", "ab\u4e2d".encode()[:-1], "a.txt: byte 2: not UTF-8"),
    "NUL": ("a.txt", b"ab\0c", "a.txt: byte 2: a NUL byte"),
    "UTF-16": ("a.txt", "hello".encode("utf-16"), "a.txt: this is UTF-16 text"),
    "gzip": ("a.txt", gzip.compress(b"hello"), "a.txt: this is gzip data"),
    "zip": ("a.jsonl", b"PK\x03\x04....", "a.jsonl: this is a zip archive"),
    "broken JSON": ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2:10: not valid JSON"),
    "not an object": (
        "a.jsonl",
        b"[1]",
        "a.jsonl:1: expected one JSON object per line, found list",
    ),
    "deep JSON": ("a.jsonl", b"[" * 200_000, "a.jsonl:1: JSON nested too deeply"),
    "no field": ("a.jsonl", b'{"body": "x", "id": 1}', "fields present: body, id; name one with"),
    "field of another type": ("a.jsonl", b'{"text": 5}', 'field "text" is int, not a string'),
    "lone surrogate": ("a.jsonl", b'{"text": "a\\ud800b"}', "lone surrogate U+D800 at character 1"),
    "NUL in JSON": ("a.jsonl", b'{"text": "\\u0000"}', "a.jsonl:1: a NUL character"),
    "latin-1 in JSON": ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}', "a.jsonl:2: byte 24: not"),
    "not parquet": ("a.parquet", b"PAR1 no", "a.parquet: not a readable parquet file"),
    "empty parquet": ("a.parquet", b"", "a.parquet: not a readable parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_strict_names_the_place(tmp_path: Path, case: str) -> None:
    name, data, message = BAD[case]
    put(tmp_path, name, data)
    with pytest.raises(DataError) as caught:
        texts(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", BAD)
def test_skip_leaves_it_out_and_counts_it(tmp_path: Path, case: str) -> None:
    name, data, message = BAD[case]
    put(tmp_path, name, data)
    put(tmp_path, "z.txt", b"good")
    count = tally(tmp_path)
    assert count.flawed == 1
    assert count.documents == (2 if b'{"text": "x"}' in data else 1)
    assert message in count.flaws[0]


@pytest.mark.parametrize("case", ["gzip", "broken JSON", "no field", "not parquet"])
def test_replace_forgives_characters_only(tmp_path: Path, case: str) -> None:
    put(tmp_path, *BAD[case][:2])
    with pytest.raises(DataError):
        texts(tmp_path, "replace")


def test_replace(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", b"caf\xe9 \0!")
    put(tmp_path, "b.jsonl", b'{"text": "a\\ud800b\\u0000"}')
    assert texts(tmp_path, "replace") == ["caf\ufffd \ufffd!", "a\ufffdb\ufffd"]


def test_parquet_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match='no column "text"; columns present: body, n'):
        texts(tmp_path)
    with pytest.raises(DataError, match='column "n" is int64, not a string'):
        texts(tmp_path, text_field="n")


def test_parquet_with_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    column = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet: row 2: byte 3: not UTF-8"):
        texts(tmp_path)


def test_blank_documents_are_counted_not_used(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", b"")
    put(tmp_path, "b.txt", b" \n\r\n\t\n")
    put(tmp_path, "c.jsonl", b'\n\n{"text": "  "}\n')
    assert tally(tmp_path, "strict") == ReadStats(empty=3)


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="a.txt: cannot be read .No such file"):
        texts(tmp_path)
    assert tally(tmp_path).flawed == 1


def test_folder_without_a_usable_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable file; it is empty"):
        texts(tmp_path)
    put(tmp_path, "a.bin.gz", b"")
    with pytest.raises(
        DataError, match="found only .bin.gz; needs .txt .md .py .jsonl .json .parquet"
    ):
        texts(tmp_path)
    with pytest.raises(DataError, match="missing: no such file or folder"):
        texts(tmp_path / "missing")


def test_odd_names_give_one_printable_line(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", json.dumps({"b\nc": 1, "\ud800": 2}).encode())
    (tmp_path / os.fsdecode(b"\xe9\n.txt")).write_bytes(b"\xff")
    flaws = tally(tmp_path).flaws
    assert len(flaws) == 2
    assert all(flaw.isprintable() for flaw in flaws)
    assert "fields present: b\\nc, \\ud800" in flaws[0]


def test_document_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(spans, "CHUNK_BYTES", 300)
    put(tmp_path, "a.txt", b"x" * 5000)
    with pytest.raises(DataError, match="a.txt: a document of more than"):
        texts(tmp_path)
    with pytest.raises(DataError, match="a.txt: a document of more than"):
        texts(tmp_path, document_separator="\n")
    put(tmp_path, "a.txt", b"")
    put(tmp_path, "b.jsonl", json.dumps({"text": "x" * 5000}).encode())
    with pytest.raises(DataError, match="b.jsonl:1: a document of more than"):
        texts(tmp_path)


def test_a_big_text_file_is_streamed(tmp_path: Path) -> None:
    path = put(tmp_path, "a.txt", b"some words on a line\n\n" * 1_500_000)
    corpus = open_corpus(SourceSpec("local", str(path), document_separator="\n\n"), "strict")
    first = iter(read_documents(corpus, ReadStats()))
    tracemalloc.start()
    try:
        for _ in zip(range(200_000), first, strict=False):
            pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10 * spans.CHUNK_BYTES  # a document of 22 bytes takes 70


def test_fifty_megabyte_line(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", b'{"text": "' + b"x" * 50_000_000 + b'"}\n{"text": "y"}')
    assert [len(text) for text in texts(path)] == [50_000_000, 1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_what_follows_a_document_over_the_limit_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packed: bool
) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(spans, "CHUNK_BYTES", 300)
    long = ["before", "x" * 5000, "between", "y" * 20_000, *(f"after {i}" for i in range(50))]
    lines = [json.dumps({"text": text}) for text in long] if name == "a.jsonl" else long
    data = "\n".join(lines).encode()
    put(tmp_path, name + ".gz" * packed, gzip.compress(data) if packed else data)
    spec = {} if name == "a.jsonl" else {"document_separator": "\n"}
    expected = [text for text in long if len(text) < 1000]
    assert texts(tmp_path, "skip", **spec) == expected
    with pytest.raises(DataError, match="a document of more than"):
        texts(tmp_path, **spec)


def test_a_number_of_thousands_of_digits(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", b'{"text": "x"}\n{"text": ' + b"1" * 5000 + b"}")
    with pytest.raises(DataError, match="a.jsonl:2: (not valid JSON|field .text. is int)"):
        texts(tmp_path)


def test_what_is_no_file_and_cannot_be_entered(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    put(tmp_path, "b.txt", b"good")
    with pytest.raises(DataError, match="a.txt: cannot be read .not a regular file"):
        texts(tmp_path)
    assert tally(tmp_path).flawed == 1


def test_a_disk_that_fails_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    put(tmp_path, "a.jsonl", b'{"text": "x"}')
    monkeypatch.setattr(readers, "open_binary", fails)
    with pytest.raises(RetryableError, match="a.jsonl: Input/output error; run again"):
        texts(tmp_path, "skip")
