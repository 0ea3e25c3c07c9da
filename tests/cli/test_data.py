"""fgpt prepare, fgpt tokenizer and fgpt data, by their flags."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fgpt.cli.corpus_flags import add_corpus_flags, recipe_from
from fgpt.cli.prepare import prepare_verb
from fgpt.cli.tokenizer import tokenizer_verb
from fgpt.data.token_dataset import TokenDataset, open_token_dataset
from fgpt.errors import DataError
from fgpt.tokenizer.load import load_tokenizer
from tests.ranks import ROOT


def test_prepare_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("play.txt").write_text("first scene\n\nsecond scene\r\n\r\nthird\n")
    argv = ["--input", "play.txt", "--vocab_size", "300", "--document_separator", r"\n\n"]
    assert prepare_verb(argv) == 0
    done = open_token_dataset("data/prepared/play")
    assert done.card.source.documents == 3
    assert done.card.recipe.source.document_separator == "\n\n"
    with pytest.raises(DataError, match="other settings"):
        prepare_verb([*argv, "--seed", "5"])
    assert prepare_verb([*argv, "--seed", "5", "--force"]) == 0
    assert open_token_dataset("data/prepared/play").card.recipe.seed == 5


def test_flags_lie_over_a_recipe(tmp_path: Path, corpus: Path, prepared: TokenDataset) -> None:
    recipe = tmp_path / "r.json"
    source = {"kind": "local", "path": str(corpus)}
    recipe.write_text(json.dumps({"name": "r", "source": source, "errors": "skip"}))
    out = str(tmp_path / "out")
    argv = ["--recipe", str(recipe), "--out", out, "--tokenizer", str(prepared.path)]
    assert prepare_verb([*argv, "--validation_fraction", "0.1"]) == 0
    done = open_token_dataset(out).card
    assert done.recipe.errors == "skip"
    assert done.fingerprint() == prepared.card.fingerprint()


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "one of the arguments --recipe --input --dataset is required"),
        (["--recipe", "r", "--input", "i"], "not allowed with"),
        (["--input", "i", "--tokenizer", "t", "--vocab_size", "300"], "have no effect"),
        (["--input", "i", "--errors", "ignore"], "invalid choice"),
        (["--input", "i", "--sed", "1"], "unrecognized arguments"),
    ],
)
def test_wrong_flags(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        prepare_verb(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_values() -> None:
    with pytest.raises(DataError, match='flags: .*vocab_size" is 12; at least 257'):
        prepare_verb(["--input", "x", "--vocab_size", "12"])
    with pytest.raises(DataError, match='flags: "validation_fraction" is 2.0'):
        prepare_verb(["--input", "x", "--validation_fraction", "2"])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\n\n", "\n\n"),
        (r"\t", "\t"),
        (r"\r\n\r\n", "\r\n\r\n"),
        (r"\f", "\f"),
        (r"\x0c", "\f"),
        (r"\u2029", "\u2029"),
        (r"a\\nb", r"a\nb"),
        ("===", "==="),
    ],
)
def test_document_separators(written: str, meant: str) -> None:
    parser = argparse.ArgumentParser()
    add_corpus_flags(parser)
    args = parser.parse_args(["--input", "x", "--document_separator", written])
    args.out = None
    assert recipe_from(args).source.document_separator == meant


def test_tokenizer_train(corpus: Path, tmp_path: Path) -> None:
    argv = ["train", "--input", str(corpus), "--vocab_size", "300", "--out", str(tmp_path / "t")]
    assert tokenizer_verb(argv) == 0
    assert load_tokenizer(tmp_path / "t").vocab_size == 300
    assert tokenizer_verb(argv) == 0
    argv[4] = "310"
    with pytest.raises(DataError, match="holds another tokenizer; --force"):
        tokenizer_verb(argv)
    own = {name: tmp_path / "t" / name for name in ("tokenizer.py", "tokenizer.txt", "tokenizer.")}
    for file in own.values():
        file.write_text("mine")
    assert tokenizer_verb([*argv, "--force"]) == 0
    assert load_tokenizer(tmp_path / "t").vocab_size == 310
    assert all(file.read_text() == "mine" for file in own.values())
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="no document with text in it"):
        tokenizer_verb(["train", "--input", str(tmp_path / "a.txt"), "--out", str(tmp_path / "u")])
    assert not (tmp_path / "u").exists()


def test_encode_and_decode(
    prepared: TokenDataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--tokenizer", str(prepared.path)]
    assert tokenizer_verb(["encode", "caf\u00e9 <|endoftext|>", *where]) == 0
    ids = capsys.readouterr().out.split()
    assert tokenizer_verb(["decode", *ids, *where]) == 0
    assert capsys.readouterr().out == "caf\u00e9 <|endoftext|>\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("caf\u00e9".encode())))
    assert tokenizer_verb(["encode", *where]) == 0
    expected = prepared.tokenizer.encode("caf\u00e9")
    assert capsys.readouterr().out.split() == [str(i) for i in expected]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    with pytest.raises(DataError, match="stdin: byte 3: not UTF-8"):
        tokenizer_verb(["encode", *where])


def test_inspect(prepared: TokenDataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenizer_verb(["inspect", "--tokenizer", str(prepared.path)]) == 0
    out = capsys.readouterr().out
    assert prepared.card.tokenizer.sha256 in out
    assert "ids          400" in out


@pytest.mark.parametrize("reason", ["full", "a file", "read-only"])
def test_tokenizer_train_checks_out_before_it_learns(
    reason: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**options: object) -> io.BufferedIOBase:
        raise OSError(28, "No space left on device")

    def learn(*args: object) -> None:
        raise AssertionError("learned first")

    monkeypatch.setattr("fgpt.cli.tokenizer.learn_tokenizer", learn)
    out = tmp_path / "new" / "folder"
    message = "No space left on device"
    if reason == "full":
        monkeypatch.setattr("fgpt.utils.files.tempfile.TemporaryFile", full)
    elif reason == "a file":
        (tmp_path / "new").touch()
        message = "Not a directory"
    else:
        out, message = Path("/proc/none"), "No such file or directory|Permission|Read-only"
    with pytest.raises(DataError, match=f"--out {out}: cannot be written .({message})"):
        tokenizer_verb(["train", "--input", str(corpus), "--out", str(out)])
    assert not (tmp_path / "new").is_dir()


def test_a_reader_of_messages_that_goes_away(corpus: Path, tmp_path: Path) -> None:
    """`fgpt prepare 2>&1 | head -1` finishes the data set."""
    out = tmp_path / "out"
    command = f"{sys.executable} -m fgpt.cli prepare --input {corpus} --out {out} 2>&1 | head -c 1"
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environ)
    assert done.stdout == "p" and done.stderr == ""
    assert open_token_dataset(out).card.source.documents == 80
