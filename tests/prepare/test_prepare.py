"""Preparation: the same bytes every time, the right split, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from fgpt.data.card import load_card
from fgpt.data.recipe import Recipe, SourceSpec
from fgpt.data.token_dataset import TokenDataset, open_token_dataset
from fgpt.errors import DataError
from fgpt.prepare import parts
from fgpt.prepare.pipeline import ensure_prepared, prepare
from fgpt.prepare.sources.corpus import ReadStats, read_documents
from fgpt.prepare.sources.open_corpus import open_corpus
from fgpt.prepare.split import split_keys
from fgpt.tokenizer.spec import TokenizerSpec
from tests.prepare.corpora import CHILD, REPOSITORY, run_python, small_recipe, tree, write_corpus


def documents(path: Path) -> list[str]:
    corpus = open_corpus(SourceSpec("local", str(path)), "strict")
    return [document.text for document in read_documents(corpus, ReadStats())]


def keys_of(seed: int, texts: list[str]) -> np.ndarray:
    digests = b"".join(xxhash.xxh3_128(text.encode()).digest() for text in texts)
    return split_keys(seed, np.frombuffer(digests, np.uint8).reshape(-1, 16))


def test_every_document_is_in_one_split_ended_by_eod(prepared: TokenDataset, corpus: Path) -> None:
    eod, seed = prepared.tokenizer.eod_id, prepared.card.recipe.seed
    decoded: dict[str, list[str]] = {}
    for name, tokens in (("train", prepared.train), ("valid", prepared.valid)):
        decoded[name] = []
        for i in range(tokens.document_count):
            ids = tokens.document(i)
            assert ids[-1] == eod and eod not in ids[:-1]
            decoded[name].append(prepared.tokenizer.decode(ids[:-1]))
    assert sorted(decoded["train"] + decoded["valid"]) == sorted(documents(corpus))
    keys = {name: keys_of(seed, texts) for name, texts in decoded.items()}
    assert keys["valid"].max() < keys["train"].min()


def test_split_does_not_depend_on_names_or_order(prepared: TokenDataset, tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": text})
        for text in documents(Path(prepared.card.recipe.source.path or ""))
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(reversed(lines)))
    prepare(small_recipe(tmp_path), tmp_path / "out", progress=False)
    other = open_token_dataset(tmp_path / "out")
    assert other.valid.document_count == prepared.valid.document_count
    assert sorted(
        other.tokenizer.decode(other.valid.document(i)) for i in range(other.valid.document_count)
    ) == sorted(
        prepared.tokenizer.decode(prepared.valid.document(i))
        for i in range(prepared.valid.document_count)
    )


def test_equal_texts_are_never_on_both_sides(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {i % 7}"}) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(small_recipe(tmp_path, validation_fraction=0.5), tmp_path / "out", progress=False)
    done = open_token_dataset(tmp_path / "out")
    sides = [
        {done.tokenizer.decode(tokens.document(i)) for i in range(tokens.document_count)}
        for tokens in (done.train, done.valid)
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 0.999999])
def test_both_splits_are_never_empty(tmp_path: Path, fraction: float) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    card = prepare(
        small_recipe(tmp_path, validation_fraction=fraction), tmp_path / "out", progress=False
    )
    assert card.train.documents == card.valid.documents == 1


@pytest.mark.parametrize("env", [{"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "3"}])
def test_same_bytes_for_any_number_of_threads(
    prepared: TokenDataset, corpus: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    done = run_python(CHILD, corpus, tmp_path / "out", 0, "no", **env)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(prepared.path)


def test_same_bytes_for_any_batch_size(
    prepared: TokenDataset, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "BATCH_BYTES", 100)
    prepare(recipe, tmp_path / "out", progress=False)
    assert tree(tmp_path / "out") == tree(prepared.path)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.txt": ""}, "no document with text in it .1 blank, 0 skipped"),
        ({"a.txt": "\n\n \n", "b.txt": ""}, "no document with text in it .2 blank"),
        ({"a.txt": "x"}, "1 distinct document, a split by document needs 2"),
        ({"a.txt": "same", "b.txt": "same"}, "1 distinct document"),
    ],
)
def test_corpus_too_small(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "texts").mkdir()
    for name, text in files.items():
        (tmp_path / "texts" / name).write_text(text)
    with pytest.raises(DataError, match=message):
        prepare(small_recipe(tmp_path / "texts"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_second_run_does_nothing(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare(recipe, tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert prepare(replace(recipe, notes="other words"), tmp_path / "out") == first
    assert "up to date, nothing to do" in capsys.readouterr().err
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_other_settings_sources_or_folders_are_not_overwritten(tmp_path: Path) -> None:
    texts, out = write_corpus(tmp_path / "texts", documents=5), tmp_path / "out"
    recipe = small_recipe(texts)
    prepare(recipe, out, progress=False)
    with pytest.raises(DataError, match="holds data of recipe small with other settings; --force"):
        prepare(replace(recipe, seed=2), out, progress=False)
    (texts / "new.txt").write_text("more")
    with pytest.raises(DataError, match="its sources changed after it was prepared; --force"):
        prepare(recipe, out, progress=False)
    assert prepare(recipe, out, progress=False, force=True).source.documents == 6
    with pytest.raises(DataError, match="texts: exists and is not a data set"):
        prepare(recipe, texts, progress=False, force=True)
    assert len(documents(texts)) == 6


@pytest.mark.parametrize("out", ["", ".", "/", "a/.."])
def test_output_without_a_name(recipe: Recipe, out: str) -> None:
    with pytest.raises(DataError, match="is not a name for a new directory"):
        prepare(recipe, out, progress=False)


def test_output_that_cannot_be_written(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="out: cannot be written .*"):
        prepare(recipe, tmp_path / "file" / "out", progress=False)


def test_an_existing_tokenizer(prepared: TokenDataset, corpus: Path, tmp_path: Path) -> None:
    recipe = small_recipe(corpus, tokenizer=TokenizerSpec(path=str(prepared.path)))
    card = prepare(recipe, tmp_path / "out", progress=False)
    assert card.tokenizer == prepared.card.tokenizer
    assert card.fingerprint() == prepared.card.fingerprint()
    other = write_corpus(tmp_path / "texts", documents=3)
    prepare(small_recipe(other), tmp_path / "other", progress=False)
    (tmp_path / "link").symlink_to(prepared.path)
    recipe = small_recipe(corpus, tokenizer=TokenizerSpec(path=str(tmp_path / "link")))
    prepare(recipe, tmp_path / "out2", progress=False)
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match="was encoded with another tokenizer than"):
        prepare(recipe, tmp_path / "out2", progress=False)


def test_ensure_prepared(tmp_path: Path, corpus: Path) -> None:
    text = json.dumps({"name": "mine", "source": {"kind": "local", "path": str(corpus)}})
    (tmp_path / "mine.json").write_text(text)
    first = ensure_prepared(tmp_path / "mine", tmp_path / "mine.json", progress=False)
    again = ensure_prepared(tmp_path / "mine", tmp_path / "missing.json", progress=False)
    assert first.card == again.card
    with pytest.raises(DataError, match="mnie: no data set here.* fgpt prepare --recipe"):
        ensure_prepared(tmp_path / "mnie", tmp_path / "mine.json", progress=False)
    with pytest.raises(
        DataError, match="mnie: no data set here, and no recipe .*gone.json; correct"
    ):
        ensure_prepared(tmp_path / "mnie", tmp_path / "gone.json", progress=False)
    other = tmp_path / "other"
    other.write_text("not a data set")
    for path in (other, tmp_path):
        with pytest.raises(DataError, match="is no token data set, .*; correct data.path"):
            ensure_prepared(path, tmp_path / "mine.json", progress=False)
    assert not (tmp_path / "mnie").exists()


@pytest.mark.parametrize("size", [5_000_000, pytest.param(50_000_000, marks=pytest.mark.slow)])
def test_a_huge_line_without_a_space(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * size + '"}\n{"text": "y"}')
    card = prepare(small_recipe(tmp_path), tmp_path / "out", progress=False)
    assert card.source.bytes == size + 1


@pytest.mark.slow
def test_the_default_corpus(tmp_path: Path) -> None:
    from fgpt.data.recipe import load_recipe

    recipe = load_recipe(REPOSITORY / "data/recipes/python-stdlib.json")
    card = prepare(recipe, tmp_path / "a", progress=False)
    assert card.train.tokens > 2_000_000 and card.valid.tokens > 20_000
    assert card.tokenizer.vocab_size == 4096
    prepare(recipe, tmp_path / "b", progress=False)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert load_card(tmp_path / "a") == card
    done = open_token_dataset(tmp_path / "a", verify=True)
    stored = {
        done.tokenizer.decode(t.document(i)[:-1])
        for t in (done.train, done.valid)
        for i in range(t.document_count)
    }
    corpus = open_corpus(recipe.source, recipe.errors)
    assert stored == {document.text for document in read_documents(corpus, ReadStats())}
