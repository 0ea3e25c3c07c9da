"""The report at the end of a preparation: its figures recounted, its advice followed."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fgpt.cli import main
from fgpt.data.token_dataset import TokenDataset, open_token_dataset
from fgpt.prepare import health
from fgpt.prepare.parts import DOCUMENT
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
from tests.prepare.corpora import write_corpus

DRAW = random.Random(5)
WORDS = ["".join(DRAW.choices("abcdefghij", k=DRAW.randint(2, 8))) for _ in range(800)]


def words(count: int) -> str:
    return " ".join(DRAW.choices(WORDS, k=count))


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")


def report_of(
    capsys: pytest.CaptureFixture[str], *argv: str | Path
) -> tuple[str, list[str], TokenDataset]:
    """Prepare OUT; returns the report, its warnings and the data set."""
    code = main(["prepare", *map(str, argv), "--out", "out", "--force"])
    report = capsys.readouterr().err
    assert code == 0, report
    warnings = re.findall(r"  warning: (.*)", report)
    return report, warnings, open_token_dataset("out")


def test_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_corpus(tmp_path / "texts", documents=300, words=400)
    for i in range(6):  # copies of the first text, of 306 documents
        (folder / f"copy{i}.txt").write_text((folder / "000.txt").read_text())
    (folder / "a.csv").write_text("1,2")
    argv = ("--input", folder, "--vocab_size", "400", "--test_fraction", "0.05")
    report, warnings, done = report_of(capsys, *argv)
    for name, info in done.card.splits.items():
        tokens = getattr(done, name)
        assert tokens.tokens == info.tokens
        samples = (max(0, info.tokens // n - 1) for n in (256, 1024))
        line = "{}: {:,} tokens, {:,} samples of 256 tokens or {:,} of 1,024"
        assert line.format(name, info.tokens, *samples) in report
    splits = [getattr(done, name) for name in done.card.splits]
    documents = [tuple(s.document(i)) for s in splits for i in range(s.document_count)]
    assert f"longest document: {max(map(len, documents)):,} tokens" in report
    copies = sum(count - 1 for count in Counter(documents).values())
    assert copies == 6 and f"copies: {copies / len(documents):.1%} of the documents" in report
    assert "not read, by suffix: 1 .csv files" in report
    assert [
        warning for warning in warnings if "test" not in warning and "valid" not in warning
    ] == []


def test_a_large_corpus_is_sampled_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_KEYS", 2000)
    table = np.zeros(40_000, DOCUMENT)
    table["key"] = np.random.default_rng(0).integers(0, 2**64, len(table), np.uint64)
    table["key"][30_000:] = table["key"][:10_000]
    table["tokens"] = np.arange(len(table)) % 77
    stats = health.document_stats(np.array_split(table, 9), len(table))
    assert stats.longest == 76
    assert stats.copies == pytest.approx(0.25, abs=0.03)


def test_a_play(capsys: pytest.CaptureFixture[str]) -> None:
    """The command of data/README.md, on 150 speeches."""
    Path("play.txt").write_text("\n\n".join(f"ONE:\n{words(40)}" for _ in range(150)))
    flags = ("--input", "play.txt", "--document_separator", r"\n\n")
    report, _, done = report_of(capsys, *flags)
    assert done.valid.tokens >= 5 * 256
    assert done.train.tokens > done.card.tokens / 2
    assert re.search(r"vocab_size not reached: [\d,]+ ids of the 4,096 asked for", report)


def test_a_short_split_gets_advice_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts").mkdir()
    for i in range(400):
        Path(f"texts/{i}.txt").write_text(words(300))
    flags = ("--input", "texts")
    _, warnings, done = report_of(capsys, *flags)
    assert done.valid.tokens < 5 * 1024
    (warning,) = warnings
    assert "fewer than 4 samples of 1,024" in warning
    advice = re.search(r"(--validation_fraction [\d.]+) --force makes it longer", warning)
    assert advice, warning
    _, warnings, done = report_of(capsys, *flags, *advice[1].split())
    assert warnings == [] and done.valid.tokens >= 5 * 1024


def test_one_long_document(capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts").mkdir()
    Path("texts/a.txt").write_text(words(30_000))
    Path("texts/b.txt").write_text("hello!")
    _, warnings, done = report_of(capsys, "--input", "texts")
    assert done.valid.tokens < 10 < done.train.tokens
    assert any(re.match("one document has 100% of the tokens; --document_sep", w) for w in warnings)


def test_a_folder_whose_readme_is_all_that_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("set/data").mkdir(parents=True)
    Path("set/README.md").write_text(words(3000))
    Path("set/ABOUT.md").write_text(words(3000))
    for i in range(3):
        Path(f"set/data/{i}.json").write_text(f'{{"content": "{words(200)}"}}\n' * 20)
    _, warnings, done = report_of(capsys, "--input", "set")
    assert done.card.source.files == 2
    (warning,) = [w for w in warnings if "files were read" in w]
    assert "2 files were read, 3 .json files were not" in warning and "--text_field" in warning
    _, warnings, done = report_of(capsys, "--input", "set/data", "--text_field", "content")
    assert done.card.source.files == 3 and not any("files were read" in w for w in warnings)
    assert any("of the documents are copies" in w for w in warnings)


def test_text_that_the_tokenizer_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    Path("texts").mkdir()
    for i in range(40):
        Path(f"texts/{i}.txt").write_text("我们今天去北京大学。" * 20 + " the cat " * 8 + " " * i)
    # 1. byte fallback
    train_tokenizer(TokenizerSpec(300, kind="sentencepiece-bpe"), [words(500)]).save("bytes.model")
    _, warnings, _ = report_of(capsys, "--input", "texts", "--tokenizer", "bytes.model")
    assert any("of the tokens in a sample are single bytes" in w for w in warnings)
    # 2. an unknown token, 3. none: the library drops the text
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<|endoftext|>", *"thecat"[:-1]])}
    for unk in ("<unk>", None):
        backend = Backend(models.BPE(vocabulary, [], unk_token=unk))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens(["<|endoftext|>"])
        backend.save("tokenizer.json")
        argv = ("--input", "texts", "--tokenizer", "tokenizer.json")
        _, warnings, _ = report_of(capsys, *argv)
        (warning,) = [w for w in warnings if "are lost" in w]
        share = 200 / (200 + 8 * 6)
        assert warning.startswith(f"{share:.0%} of the characters in a sample are lost")


def test_lines_of_letters(capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts").mkdir()
    for i in range(30):
        lines = ("".join(DRAW.choices("abcdefghij", k=1500)) for _ in range(5))
        Path(f"texts/{i}.txt").write_text("\n".join(lines))
    _, warnings, _ = report_of(capsys, "--input", "texts")
    assert any(
        w.startswith("1.00 bytes per token") and "1,000 or more letters" in w for w in warnings
    )
