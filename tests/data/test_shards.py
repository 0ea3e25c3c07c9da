"""The format as Megatron reads it; a corrupt index is refused before .bin is mapped."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fgpt.data.index import dtype_for
from fgpt.data.shards import IndexedTokens
from fgpt.errors import DataError
from fgpt.prepare.shard_writer import ShardWriter

DOCUMENTS = [[5, 6, 7, 0], [1, 0], [0], [65535, 2, 0]]


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 65536) -> Path:
    with ShardWriter(prefix, vocab_size) as writer:
        for ids in documents:
            writer.add(np.array(ids))
        writer.close()
    return prefix


def parse(prefix: Path) -> list[list[int]]:
    """An independent reader, written from the description of the format."""
    raw = prefix.with_suffix(".idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack("<Q", raw[9:17]) == (1,)
    kind, size = {8: ("H", 2), 4: ("i", 4)}[raw[17]]
    sequences, entries = struct.unpack("<QQ", raw[18:34])
    lengths = struct.unpack(f"<{sequences}i", raw[34 : 34 + 4 * sequences])
    rest = raw[34 + 4 * sequences :]
    pointers = struct.unpack(f"<{sequences}q", rest[: 8 * sequences])
    documents = struct.unpack(f"<{entries}q", rest[8 * sequences :])
    data = prefix.with_suffix(".bin").read_bytes()
    parts = [
        list(struct.unpack_from(f"<{length}{kind}", data, pointer))
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    assert sum(lengths) * size == len(data)
    return [sum(parts[a:b], []) for a, b in zip(documents[:-1], documents[1:], strict=True)]


@pytest.mark.parametrize("vocab_size, name", [(65536, "uint16"), (65537, "int32")])
def test_written_files_by_an_independent_reader(tmp_path: Path, vocab_size: int, name: str) -> None:
    prefix = write(tmp_path / "x", DOCUMENTS, vocab_size)
    assert dtype_for(vocab_size).name == name
    assert parse(prefix) == DOCUMENTS
    tokens = IndexedTokens(prefix)
    assert tokens.dtype.name == name
    assert tokens.tokens == 10
    assert [tokens.document(i).tolist() for i in range(tokens.document_count)] == DOCUMENTS


def test_the_worked_example_of_the_readme(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[7, 8, 9, 0], [5, 0]], 4096)
    index = prefix.with_suffix(".idx").read_bytes()
    assert prefix.with_suffix(".bin").read_bytes().hex(" ", 2) == "0700 0800 0900 0000 0500 0000"
    assert index == b"MMIDIDX\0\0" + struct.pack("<QBQQ2i2q3q", 1, 8, 2, 3, 4, 2, 0, 8, 0, 1, 2)


def test_shard_info(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", 65536) as writer:
        for ids in DOCUMENTS:
            writer.add(np.array(ids))
        info = writer.close()
    assert (info.documents, info.tokens, info.max_id, info.bin_bytes) == (4, 10, 65535, 20)
    assert info.idx_bytes == (tmp_path / "x.idx").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("ids", [[-1, 0], [70000], [65536]])
def test_ids_that_would_wrap_are_refused(tmp_path: Path, ids: list[int]) -> None:
    bad = min(ids) if min(ids) < 0 else max(ids)
    with pytest.raises(DataError, match=f"id {bad} is outside 0..65535"):
        write(tmp_path / "x", [[1, 2], ids])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "x", 100) as writer:
        writer.add(np.array([1, 2]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_documents_of_several_sequences_are_read(tmp_path: Path) -> None:
    # Megatron's own tools may split a document into sentences.
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 3, 3)
    body = struct.pack("<3i3q3q", 2, 1, 1, 0, 8, 12, 0, 2, 3)
    (tmp_path / "x.idx").write_bytes(header + body)
    (tmp_path / "x.bin").write_bytes(struct.pack("<4i", 9, 8, 7, 70000))
    tokens = IndexedTokens(tmp_path / "x")
    assert [tokens.document(i).tolist() for i in range(2)] == [[9, 8, 7], [70000]]


# Offsets in the index of DOCUMENTS: 34 lengths (4 x 4), 50 pointers (4 x 8), 82 documents (5 x 8).
PATCHES = {
    "magic": (0, b"PK", "magic is b'PKIDIDX"),
    "version": (9, struct.pack("<Q", 2), "version is 2, expected 1"),
    "dtype code": (17, b"\x06", "dtype code is 6, expected one of 1 (uint8)"),
    "sequence count": (18, struct.pack("<Q", 5), "5 sequences and 5 document entries need"),
    "huge sequence count": (18, b"\xff" * 8, "18446744073709551615 sequences"),
    "document count": (26, struct.pack("<Q", 2**60), "document entries need"),
    "negative length": (38, struct.pack("<i", -2), "length of sequence 1 is -2"),
    "length": (34, struct.pack("<i", 5), "pointer of sequence 1 is 8, expected 10"),
    "last length": (46, struct.pack("<i", 4), "is 20 bytes, expected 22 for 11 tokens"),
    "pointer": (58, struct.pack("<q", 6), "pointer of sequence 1 is 6, expected 8"),
    "pointer overflow": (58, struct.pack("<q", 2**62), "pointer of sequence 1 is"),
    "negative pointer": (50, struct.pack("<q", -8), "pointer of sequence 0 is -8"),
    "document start": (82, struct.pack("<q", 1), "document index does not rise from 0 to 4"),
    "document order": (90, struct.pack("<q", 3), "document index does not rise from 0 to 4"),
    "document end": (114, struct.pack("<q", 9), "document index does not rise from 0 to 4"),
}


@pytest.mark.parametrize("field", PATCHES)
def test_a_corrupt_index_is_refused(tmp_path: Path, field: str) -> None:
    prefix = write(tmp_path / "x", DOCUMENTS)
    offset, data, message = PATCHES[field]
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    assert raw[offset : offset + len(data)] != data
    raw[offset : offset + len(data)] = data
    (tmp_path / "x.idx").write_bytes(raw)
    with pytest.raises(DataError) as caught:
        IndexedTokens(prefix)
    assert message in str(caught.value)
    assert str(tmp_path / "x.") in str(caught.value)


def test_every_truncation_and_extension_of_the_index(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", DOCUMENTS)
    raw = (tmp_path / "x.idx").read_bytes()
    for size in range(len(raw)):
        (tmp_path / "x.idx").write_bytes(raw[:size])
        with pytest.raises(DataError, match="x.idx: "):
            IndexedTokens(prefix)
    (tmp_path / "x.idx").write_bytes(raw + b"\0")
    with pytest.raises(DataError, match="x.idx: "):
        IndexedTokens(prefix)


@pytest.mark.parametrize("size", [0, 1, 19, 21, 4096])
def test_bin_of_another_size(tmp_path: Path, size: int) -> None:
    prefix = write(tmp_path / "x", DOCUMENTS)
    os.truncate(tmp_path / "x.bin", size)
    with pytest.raises(DataError, match=f"x.bin: is {size} bytes, expected 20"):
        IndexedTokens(prefix)


def test_absent_empty_and_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="x.idx: cannot be read"):
        IndexedTokens(tmp_path / "x")
    write(tmp_path / "x", [])
    with pytest.raises(DataError, match="x.bin: holds no tokens"):
        IndexedTokens(tmp_path / "x")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(DataError, match="x.bin: cannot be read"):
        IndexedTokens(tmp_path / "x")
    (tmp_path / "y.idx").mkdir()
    with pytest.raises(DataError, match="y.idx: cannot be read"):
        IndexedTokens(tmp_path / "y")


def test_bin_cut_while_mapped_is_an_error_not_sigbus(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1] * 50_000])
    tokens = IndexedTokens(prefix)
    os.truncate(tmp_path / "x.bin", 10)
    with pytest.raises(DataError, match="x.bin: is 10 bytes"):
        tokens.read_ranges(np.array([40_000]), np.array([10]))


@pytest.mark.parametrize("start", [-1, 7, 10, 2**40])
def test_ranges_stay_inside(tmp_path: Path, start: int) -> None:
    tokens = IndexedTokens(write(tmp_path / "x", DOCUMENTS))
    with pytest.raises(DataError, match="out of range"):
        tokens.read_ranges(np.array([0, start]), np.array([4, 4]))
    with pytest.raises(DataError, match="no document 4; it has 4"):
        tokens.document(4)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_damage_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    prefix = write(tmp_path / "x", DOCUMENTS)
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.idx").write_bytes(raw)
    try:
        tokens = IndexedTokens(prefix)
    except DataError:
        return
    if tokens.dtype == np.int16:  # written as uint16, of the same size: the card names the type
        return
    # Only the grouping of sequences into documents can still differ; the card's hash sees that.
    assert sum((tokens.document(i).tolist() for i in range(tokens.document_count)), []) == sum(
        DOCUMENTS, []
    )
