"""The report's figures, recounted from the tokenizers' own output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from fgpt.cli.tokenizer import tokenizer_verb
from fgpt.errors import DataError
from fgpt.prepare import tokenizer_report as report
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.load import load_tokenizer
from fgpt.tokenizer.spec import Kind, TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
from tests.tokenizer.chinese import documents
from tests.tokenizer.variants import word_piece

KINDS: tuple[Kind, ...] = ("bpe", "sentencepiece-unigram", "sentencepiece-bpe")
ENGLISH = ["the cat sat on the mat\n" * 30, "a dog and a cat\tran away 123\n" * 20]
UNSEEN = "\u0e2a\u0e27\u0e31\u0e2a the \U0001f600 cat\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for name, texts in {"zh": documents(6), "en": [*ENGLISH, UNSEEN]}.items():
        (folder / name).mkdir()
        for i, text in enumerate(texts):
            (folder / name / f"{i}.txt").write_text(text)
    (folder / "top.txt").write_text(ENGLISH[0])
    return folder


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = TokenizerSpec(500, kind=request.param)
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(spec, [*ENGLISH, *documents(6)]).save(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    assert tokenizer_verb(["report", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def whole_characters(tokenizer: Tokenizer, text: str) -> tuple[int, int]:
    """(characters that are in whole tokens, tokens that are bytes or parts of characters)."""
    whole = parts = 0
    for i in tokenizer.encode(text):
        try:
            piece = tokenizer.token_bytes(i).decode()
        except UnicodeDecodeError:
            piece = ""
        if i in tokenizer.byte_ids or not piece:
            parts += 1
        else:
            whole += len(piece)
    return whole, parts


def test_figures_by_source(saved: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(capsys, "--tokenizer", saved, "--input", corpus)["rows"]
    tokenizer = load_tokenizer(saved)
    assert [row["source"] for row in rows] == ["zh", "en", "top.txt", "total"]
    for row, pattern in zip(rows, ("zh/*", "en/*", "top.txt", "**/*.txt"), strict=True):
        texts = [path.read_text() for path in sorted(corpus.glob(pattern))]
        text, ids = "".join(texts), [tokenizer.encode(text) for text in texts]
        tokens = sum(map(len, ids))
        assert (row["documents"], row["tokens"], row["unknown"]) == (len(texts), tokens, 0)
        assert row["bytes"] == len(text.encode())
        assert row["bytes_per_token"] == pytest.approx(len(text.encode()) / tokens)
        assert row["characters_per_token"] == pytest.approx(len(text) / tokens)
        assert row["tokens_per_word"] == pytest.approx(tokens / len(text.split()))
        used = len({i for part in ids for i in part})
        assert row["vocabulary_used"] == pytest.approx(used / tokenizer.vocab_size)
        counted = [whole_characters(tokenizer, text) for text in texts]
        assert row["in_bytes"] == pytest.approx(sum(parts for _, parts in counted) / tokens)
        if tokenizer.byte_ids:  # a token of byte-level BPE may hold a part and whole characters
            whole = sum(whole for whole, _ in counted)
            assert row["coverage"] == pytest.approx(whole / len(text))
    assert rows[1]["coverage"] == pytest.approx(1 - 5 / len("".join(ENGLISH) + UNSEEN))


def test_unknown_tokens_are_counted(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend: Backend = word_piece()
    backend.save(str(tmp_path / "tokenizer.json"))
    result = run(capsys, "--tokenizer", tmp_path, "--input", corpus / "en")
    total = result["rows"][-1]
    texts = [path.read_text() for path in sorted((corpus / "en").iterdir())]
    expected = sum(backend.encode(text).tokens.count("[UNK]") for text in texts)
    assert total["unknown"] == expected > 0
    assert total["coverage"] < 1
    about = result["tokenizers"][0]
    assert "runs of blanks" in about["loses"] and "WordPiece" in about["encoder"]


def test_many_sources_and_several_tokenizers(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text("cat " * (i + 1))
    argv = ["--input", str(tmp_path), "--tokenizer", str(saved), "--tokenizer", str(saved)]
    assert tokenizer_verb(["report", *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + 2 * 11 + 1
    assert "and 10 smaller sources" in lines[-1]
    assert lines[3].split()[0] == "19.txt" and lines[-2].split()[0] == "total"
    monkeypatch.setattr(report, "MAX_SOURCES", 5)
    rows = run(capsys, *argv)["rows"]
    assert [row["source"] for row in rows[:6]].count("(others)") == 1
    assert rows[6]["source"] == "total" and rows[6]["documents"] == 20
    assert 20 == sum(row["documents"] for row in rows[:6])


def test_bytes_of_tokens_make_the_text(saved: Path) -> None:
    tokenizer = load_tokenizer(saved)
    for text in (*documents(2), *ENGLISH, UNSEEN, " a\u2581\x01"):
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_wrong_input(saved: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample_mb is 0"):
        argv = ["--tokenizer", str(saved), "--input", str(corpus), "--sample_mb", "0"]
        tokenizer_verb(["report", *argv])
    (tmp_path / "a.txt").write_text("  \n")
    with pytest.raises(DataError, match="no document with text in it"):
        tokenizer_verb(["report", "--tokenizer", str(saved), "--input", str(tmp_path)])


def test_train_inspect_encode_decode(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "t")
    argv = ["train", "--input", str(corpus), "--vocab_size", "500", "--out", out]
    for kind in KINDS:
        assert tokenizer_verb([*argv, "--kind", kind, "--force"]) == 0
        assert len(list(Path(out).iterdir())) == 1
        capsys.readouterr()
        assert tokenizer_verb(["inspect", "--tokenizer", out]) == 0
        lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
        assert int(lines["ids"]) == load_tokenizer(out).vocab_size <= 500
        assert lines["loses"] == "none of the probes"
        assert kind.split("-")[-1].upper() in lines["kind"].upper()
        assert tokenizer_verb(["encode", "我们<|endoftext|>", "--tokenizer", out]) == 0
        ids = capsys.readouterr().out.split()
        assert tokenizer_verb(["decode", *ids, "--tokenizer", out]) == 0
        assert capsys.readouterr().out == "我们<|endoftext|>\n"
        control = ["--tokenizer", out, "--special_tokens", "control"]
        assert tokenizer_verb(["encode", "我们<|endoftext|>", *control]) == 0
        assert capsys.readouterr().out.split() != ids
        with pytest.raises(DataError, match="id 500 is outside"):
            tokenizer_verb(["decode", "500", "--tokenizer", out])
    with pytest.raises(DataError, match=r"tokenizer.model: holds another tokenizer; --force"):
        tokenizer_verb([*argv, "--kind", "bpe"])
    with pytest.raises(DataError, match="sample_mb"):
        tokenizer_verb([*argv, "--sample_mb", "0", "--force"])


@pytest.mark.parametrize("unk", [None, "<unk>"])
def test_text_without_tokens_is_not_covered(
    unk: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BPE without an unknown token drops what it does not have: a source may have no token."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<|endoftext|>", *"catx"])}
    backend = Backend(models.BPE(vocabulary, [], unk_token=unk))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    for name, text in {"zh": "我们今天 去北京", "en": "cat act dog", "xx": "x x"}.items():
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "a.txt").write_text(text)
    argv = ("--tokenizer", tmp_path / "tokenizer.json", "--input", tmp_path / "texts")
    rows = {row["source"]: row for row in run(capsys, *argv)["rows"]}
    # of "cat act dog" 6 of 11 characters have tokens, and blanks count as covered
    assert rows["en"]["coverage"] == pytest.approx(8 / 11)
    assert rows["en"]["lost"] == pytest.approx(3 / 9)
    assert rows["xx"]["coverage"] == 1
    assert rows["zh"]["coverage"] == pytest.approx(1 / 8)
    assert (rows["zh"]["lost"], rows["zh"]["tokens"]) == (1, 0 if unk is None else 7)
    assert tokenizer_verb(["report", *map(str, argv)]) == 0
