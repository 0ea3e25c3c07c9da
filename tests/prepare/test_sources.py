"""Compressed files, spans and Hugging Face data sets all give the same documents."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fgpt.data.recipe import Recipe, SourceSpec, check_recipe
from fgpt.errors import DataError
from fgpt.prepare.sources import corpus as corpus_module
from fgpt.prepare.sources import hub, spans
from fgpt.prepare.sources.corpus import Corpus, ReadStats, RetryableError, read_documents
from fgpt.prepare.sources.open_corpus import open_corpus


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


TEXTS = [f"document {i} " + "中文 Привет " * (i % 7) for i in range(200)]
JSONL = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Spans and tasks small enough that these corpora have many."""
    monkeypatch.setattr(spans, "SPAN_BYTES", 1000)
    monkeypatch.setattr(corpus_module, "TASK_BYTES", 3000)
    monkeypatch.setattr("fgpt.prepare.sources.local.TASK_BYTES", 3000)
    monkeypatch.setattr(hub, "TASK_BYTES", 3000)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(autouse=True)
def no_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def opened(errors: Any = "strict", **spec: Any) -> Corpus:
    source = SourceSpec(**spec)
    check_recipe(Recipe("test", source), "test")
    return open_corpus(source, errors)


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in read_documents(corpus, ReadStats())]


def test_one_folder_of_every_format(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(JSONL)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(JSONL))
    (folder / "c.jsonl.zst").write_bytes(zstd(JSONL))
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"one"))
    (folder / "e.MD.GZ").write_bytes(gzip.compress(b"two"))
    pq.write_table(pa.table({"text": TEXTS}), folder / "f.parquet", row_group_size=10)
    (folder / "g.parquet.gz").write_bytes(b"a .parquet file is compressed inside")
    corpus = opened(kind="local", path=str(folder))
    assert corpus.files == 6
    assert texts(corpus) == [*TEXTS * 3, "one", "two", *TEXTS]
    found = list(corpus.tasks())
    assert [task.number for task in found] == list(range(len(found)))
    assert len(found) > 10
    assert sum(task.size_bytes for task in found) == corpus.total_bytes


@pytest.mark.parametrize("separator", ["\n", "\n\n", "|", "<|end|>", "aa"])
def test_spans_of_a_text_file_hold_what_the_whole_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str
) -> None:
    draw = random.Random(3)
    words = ["".join(draw.choices("xyz 中é\r", k=draw.randint(1, 300))) for _ in range(100)]
    data = separator.join(words).encode()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + data)
    spec: dict[str, Any] = {"path": str(tmp_path / "a.txt"), "document_separator": separator}
    for chunk in (7, 100, 2**20):
        monkeypatch.setattr(spans, "CHUNK_BYTES", chunk)
        pieces = opened(kind="local", **spec)
        assert len(pieces.spans) > 5  # type: ignore[attr-defined]
        monkeypatch.setattr(spans, "SPAN_BYTES", 2**24)
        assert texts(pieces) == texts(opened(kind="local", **spec))
        monkeypatch.setattr(spans, "SPAN_BYTES", 1000)


def test_a_flaw_in_a_later_span_names_its_line_and_byte(tmp_path: Path) -> None:
    bad = JSONL.split(b"\n")
    bad[150] = b'{"text": "caf\xe9"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(bad))
    at = sum(len(line) + 1 for line in bad[:150]) + bad[150].index(b"\xe9")
    with pytest.raises(DataError, match=f"a.jsonl:151: byte {at}: not UTF-8"):
        texts(opened(kind="local", path=str(tmp_path)))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst"])
@pytest.mark.parametrize("damage", ["cut short", "another format", "one byte"])
def test_damaged_archives(tmp_path: Path, name: str, damage: str) -> None:
    packed = (gzip.compress if name.endswith("gz") else zstd)(JSONL * 20)
    if damage == "cut short":
        packed = packed[:-20]
    elif damage == "another format":
        packed = JSONL
    else:
        packed = packed[:1] + bytes([packed[1] ^ 255]) + packed[2:]
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        texts(opened(kind="local", path=str(tmp_path)))
    count = ReadStats()
    list(read_documents(opened("skip", kind="local", path=str(tmp_path)), count))
    assert count.flawed == 1


def test_a_bomb_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgpt.prepare.sources.readers.MAX_DOCUMENT_BYTES", 10**6)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"x" * 10**8))
    with pytest.raises(DataError, match="a.jsonl.gz:1: a document of more than"):
        texts(opened(kind="local", path=str(tmp_path)))


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    corpus = opened(kind="local", path=str(tmp_path))
    stamp = corpus.stamp()
    (tmp_path / "a.txt").write_text("other")
    assert opened(kind="local", path=str(tmp_path)).stamp() != stamp
    with pytest.raises(DataError, match="a.txt: changed while the corpus was read; run again"):
        texts(corpus)


@pytest.fixture
def json_file(tmp_path: Path) -> str:
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    return str(tmp_path / "a.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hugging_face_data_set(json_file: str, streaming: bool) -> None:
    corpus = opened(kind="datasets", name="json", data_files=(json_file,), streaming=streaming)
    assert texts(corpus) == TEXTS
    tasks = list(corpus.tasks())
    assert len(tasks) > 3
    assert [d.text for d in read_documents(corpus, ReadStats(), tasks[2:])] == texts(corpus)[
        -sum(1 for _ in read_documents(corpus, ReadStats(), tasks[2:])) :
    ]
    same = opened(kind="datasets", name="json", data_files=(json_file,), streaming=streaming)
    assert corpus.stamp() == same.stamp()


def test_part_of_a_split(json_file: str) -> None:
    spec: dict[str, Any] = {"kind": "datasets", "name": "json", "data_files": (json_file,)}
    assert texts(opened(**spec, split="train[50%:]")) == TEXTS[100:]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_are_lines_are_put_together(tmp_path: Path, streaming: bool) -> None:
    rows = [
        "",
        " = One = \n",
        "",
        " text \n",
        " = = ShardPart = = \n",
        " more \n",
        " = Two = \n",
        " x \n",
    ]
    lines = "\n".join(json.dumps({"text": row}) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    corpus = opened(
        kind="datasets",
        name="json",
        data_files=(str(tmp_path / "a.jsonl"),),
        document_start=" = [^=]",
        streaming=streaming,
    )
    assert texts(corpus) == [" = One = \n text \n = = ShardPart = = \n more \n", " = Two = \n x \n"]


@pytest.mark.parametrize("streaming", [False, True])
def test_lines_without_their_ends_get_them_back(tmp_path: Path, streaming: bool) -> None:
    """A loader of text files drops the line ends."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.txt").write_text("Title\nline one\n\nline two\nOther\nline\n")
    corpus = opened(
        kind="datasets", name=str(tmp_path / "d"), document_start="^[A-Z]", streaming=streaming
    )
    assert texts(corpus) == ["Title\nline one\n\nline two", "Other\nline"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"split": "valid"}, r"json \[valid\]: cannot be loaded \(Unknown split"),
        (
            {"text_field": "body"},
            'no column "body"; columns present: text; name one with text_field .--text_field',
        ),
        ({"name": "no/such-folder-or-set"}, "no/such-folder-or-set .train.: cannot be loaded"),
        ({"data_files": ("missing.jsonl",)}, "cannot be loaded .*missing.jsonl"),
    ],
)
def test_a_data_set_that_is_not_there(
    json_file: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    spec: dict[str, Any] = {"kind": "datasets", "name": "json", "data_files": (json_file,)}
    with pytest.raises(DataError, match=message) as caught:
        opened(**(spec | changes))
    assert "\n" not in str(caught.value)


def test_a_stream_that_breaks_is_no_fault_of_the_corpus() -> None:
    class Broken:
        def __iter__(self) -> Iterator[dict[str, str]]:
            yield {"text": "x" * 4000}
            raise ConnectionError("the network is down")

    corpus = hub.StreamingCorpus(Broken(), "remote", corpus_module.ReadOptions(), "remote")
    tasks = corpus.tasks()
    assert next(tasks).number == 0
    with pytest.raises(RetryableError, match="remote: cannot be loaded .the network is down"):
        next(tasks)


@pytest.mark.parametrize("row", [{"body": "x"}, {"text": 5}])
def test_a_stream_without_text(row: dict[str, Any]) -> None:
    rows = [{"text": "one"}, row, {"text": None}, {"text": "two"}]
    strict = hub.StreamingCorpus(rows, "remote", corpus_module.ReadOptions(), "remote")
    with pytest.raises(DataError, match='remote/rows: row 2: (no column "text"|"text" is int)'):
        texts(strict)
    skipping = hub.StreamingCorpus(
        rows, "remote", corpus_module.ReadOptions(errors="skip"), "remote"
    )
    count = ReadStats()
    assert [document.text for document in read_documents(skipping, count)] == ["one", "two"]
    assert (count.flawed, count.empty) == (1, 1)


@pytest.mark.parametrize("path", sorted(Path("data/recipes").glob("*.json")), ids=lambda p: p.stem)
def test_the_recipes(path: Path) -> None:
    from fgpt.data.recipe import load_recipe

    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.licence and recipe.size and recipe.expected_tokens


def test_a_data_set_without_rows(json_file: str, tmp_path: Path) -> None:
    from fgpt.prepare.pipeline import prepare

    source = SourceSpec("datasets", name="json", data_files=(json_file,), split="train[:0]")
    with pytest.raises(DataError, match="cannot be loaded .*corresponds to no data"):
        prepare(Recipe("none", source), tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["a.jsonl"]


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".json.zst"])
def test_json_with_an_object_per_line(tmp_path: Path, suffix: str) -> None:
    """As of C4 and Dolma, beside the files of a repository."""
    folder = tmp_path / "set"
    folder.mkdir()
    pack = {".json": bytes, ".json.gz": gzip.compress, ".json.zst": zstd}[suffix]
    (folder / f"c4{suffix}").write_bytes(pack(JSONL))
    (folder / f"config{suffix}").write_bytes(pack(b'{\n  "text": "no document"\n}'))
    (folder / f"other{suffix}").write_bytes(pack(b'{"content": "x"}\n{"content": "y"}'))
    (folder / f"list{suffix}").write_bytes(pack(b'["text"]'))
    corpus = opened(kind="local", path=str(folder))
    if suffix == ".json":
        assert texts(corpus) == TEXTS
        assert corpus.left_out == {suffix: 3}
        assert len(list(corpus.tasks())) > 3
        assert texts(opened(kind="local", path=str(folder), text_field="content")) == ["x", "y"]
    else:  # compressed files hold rows, and these lack the field
        assert corpus.left_out == {suffix: 2}
        with pytest.raises(DataError, match='no field "text"; fields present: content'):
            texts(corpus)
        (folder / f"other{suffix}").unlink()
        assert texts(opened(kind="local", path=str(folder))) == TEXTS
    # a file that is named is read, or says what is wrong
    with pytest.raises(DataError, match="not valid JSON .* one object per line is expected"):
        texts(opened(kind="local", path=str(folder / f"config{suffix}")))
    (folder / f"c4{suffix}").unlink()
    with pytest.raises(
        DataError, match=rf'only {suffix}; .* an object that has "text" .*--text_fi'
    ):
        opened(kind="local", path=str(folder))


def test_null_is_a_blank_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "one"}\n{"text": ""}\n')
    count = ReadStats()
    corpus = opened(kind="local", path=str(tmp_path))
    assert [document.text for document in read_documents(corpus, count)] == ["one"]
    assert (count.empty, count.flawed) == (2, 0)


STRING_TYPES = {
    "string_view": pa.string_view(),
    "large_string": pa.large_string(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


@pytest.mark.parametrize("kind", STRING_TYPES)
@pytest.mark.parametrize("through", ["local", "datasets", "streaming"])
def test_columns_of_every_string_type(tmp_path: Path, kind: str, through: str) -> None:
    """Polars writes string_view, pandas' categories are dictionaries."""
    path = tmp_path / "a.parquet"
    column = pa.array([*TEXTS, None, TEXTS[0]], STRING_TYPES[kind])
    pq.write_table(pa.table({"text": column}), path, row_group_size=30)
    spec: dict[str, Any] = {"kind": "datasets", "name": "parquet", "data_files": (str(path),)}
    if through == "local":
        spec = {"kind": "local", "path": str(path)}
    corpus = opened(**spec, **({"streaming": True} if through == "streaming" else {}))
    assert texts(corpus) == [*TEXTS, TEXTS[0]]


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS, "id": range(len(TEXTS))})
    rows.save_to_disk(tmp_path / "one")
    splits = {"train": rows, "validation": rows.select(range(10))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        path = str(tmp_path / name)
        corpus = opened(kind="local", path=path)
        assert texts(corpus) == TEXTS and len(list(corpus.tasks())) > 3
        assert texts(opened(kind="datasets", name=path, split="train[:3]")) == TEXTS[:3]
        assert corpus.stamp() == opened(kind="local", path=path).stamp()
    assert texts(opened(kind="datasets", name=path, split="validation")) == TEXTS[:10]
    with pytest.raises(DataError, match=r"cannot be loaded .Unknown split .*'train', 'validation'"):
        opened(kind="datasets", name=path, split="test")
    with pytest.raises(DataError, match='no column "body"; columns present: text, id'):
        opened(kind="local", path=path, text_field="body")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="one .train.: cannot be loaded"):
        opened(kind="local", path=str(tmp_path / "one"))


DAMAGED = {
    "cut.jsonl.gz": gzip.compress(JSONL)[:-100],
    "cut.jsonl.bz2": bz2.compress(JSONL)[:-100],
    "cut.jsonl.xz": lzma.compress(JSONL)[:-100],
    "empty.jsonl": b"",
    "zeros.jsonl": b"\0\0",
}


@pytest.mark.parametrize("name", [*DAMAGED, "nothing-*.jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_files_through_the_library(tmp_path: Path, name: str, streaming: bool) -> None:
    if name in DAMAGED:
        (tmp_path / name).write_bytes(DAMAGED[name])
    files = (str(tmp_path / name),)
    with pytest.raises(DataError, match="json .train.: cannot be loaded .[A-Za-z]") as caught:
        texts(opened(kind="datasets", name="json", data_files=files, streaming=streaming))
    assert "\n" not in str(caught.value) and "StopIteration" not in str(caught.value)


def test_several_inputs(tmp_path: Path) -> None:
    for name in ("b/1.txt", "a/1.txt", "a/2.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = tuple(str(tmp_path / name) for name in ("b", "c.txt", "a", "b", "a/1.txt"))
    corpus = opened(kind="local", path=paths)
    assert texts(corpus) == ["b/1.txt", "c.txt", "a/1.txt", "a/2.txt"]
    assert corpus.files == 4 and not corpus.has_changed()
    (tmp_path / "b" / "1.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=f"^{tmp_path}/b/1.txt: byte 0: not UTF-8"):
        texts(opened(kind="local", path=paths))
    with pytest.raises(DataError, match="missing: no such file or folder"):
        opened(kind="local", path=(paths[0], str(tmp_path / "missing")))
    with pytest.raises(DataError, match="expected a file or folder with a printable name"):
        opened(kind="local", path=(paths[0], ""))
