"""fgpt data inspect, verify, merge and import."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from fgpt.cli import main
from fgpt.data.shards import IndexedTokens
from fgpt.data.token_dataset import TokenDataset, open_token_dataset
from fgpt.errors import DataError
from fgpt.prepare import verify
from fgpt.prepare.pipeline import prepare
from fgpt.prepare.shard_writer import ShardWriter
from fgpt.tokenizer.spec import TokenizerSpec
from tests.prepare.corpora import small_recipe, tree, write_corpus

Copy = Callable[[], Path]


def documents(tokens: IndexedTokens) -> list[list[int]]:
    return [tokens.document(i).tolist() for i in range(tokens.document_count)]


def test_blocks_are_the_documents(prepared: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "BLOCK_TOKENS", 1000)
    monkeypatch.setattr(verify, "BLOCK_DOCUMENTS", 7)
    found = list(verify.iter_document_blocks(prepared.train))
    assert len(found) > 5
    every = [
        ids.tolist() for ids, lengths in found for ids in np.split(ids, np.cumsum(lengths)[:-1])
    ]
    assert every == documents(prepared.train)


def test_inspect(prepared: TokenDataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(prepared.path), "--split", "valid", "--samples", "2"]) == 0
    told = capsys.readouterr().out
    text = prepared.tokenizer.decode(prepared.valid.document(0))
    assert text[:40] in told.replace("\n", " ")
    assert f"{prepared.card.train.tokens:,}" in told
    bars = [line for line in told.splitlines() if line.endswith("#")]
    assert sum(int(line.split()[3]) for line in bars) == prepared.valid.document_count


def test_inspect_for_programs(prepared: TokenDataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(prepared.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["card"]["train"]["tokens"] == prepared.train.tokens
    lengths = [len(ids) for ids in documents(prepared.train)]
    facts = found["shards"]["train"]
    assert facts["lengths"]["largest"] == max(lengths)
    assert facts["lengths"]["median"] == np.median(lengths)
    counted = np.unique([int(n).bit_length() - 1 for n in lengths], return_counts=True)
    assert facts["histogram"] == {
        str(k): n for k, n in zip(*map(np.ndarray.tolist, counted), strict=True)
    }


def test_inspect_a_shard_alone(prepared: TokenDataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(prepared.path / "train")]) == 0
    told = capsys.readouterr().out.replace("\n", "")
    assert f"{prepared.train.tokens:,} tokens, uint16" in told
    assert main(["data", "inspect", str(prepared.path / "nothing")]) == 2
    assert "nothing.idx: cannot be read" in capsys.readouterr().err
    assert main(["data", "inspect", str(prepared.path), "--split", "test"]) == 2
    assert "has no test split" in capsys.readouterr().err


def test_verify(copy_of: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of()
    assert main(["data", "verify", str(folder)]) == 0
    assert capsys.readouterr().out.count("all end with the eod id") == 2
    data = bytearray((folder / "train.bin").read_bytes())
    data[len(data) // 3] ^= 1
    (folder / "train.bin").write_bytes(data)
    assert main(["data", "verify", str(folder)]) == 2
    assert "train.bin: SHA-256" in capsys.readouterr().err


def test_verify_reads_the_ids(copy_of: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of()
    card = json.loads((folder / "card.json").read_text())
    card["train"]["max_id"] -= 1
    (folder / "card.json").write_text(json.dumps(card))
    assert main(["data", "verify", str(folder)]) == 2
    assert "the largest id is" in capsys.readouterr().err


def test_merge(prepared: TokenDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_corpus(tmp_path / "texts", documents=20)
    spec = TokenizerSpec(path=str(prepared.path))
    recipe = small_recipe(texts, tokenizer=spec, test_fraction=0.2)
    prepare(recipe, tmp_path / "other", progress=False)
    other = open_token_dataset(tmp_path / "other")
    out = tmp_path / "out"
    command = ["data", "merge", str(prepared.path), str(other.path), "--out", str(out)]
    assert main(command) == 0
    done = open_token_dataset(out, verify=True)
    assert documents(done.train) == documents(prepared.train) + documents(other.train)
    assert documents(done.valid) == documents(prepared.valid) + documents(other.valid)
    assert done.test is not None and other.test is not None
    assert documents(done.test) == documents(other.test)
    assert done.card.source.documents == 100
    before = tree(out)
    assert main(command) == 2
    assert "holds a data set; --force replaces it" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert tree(out) == before
    assert main(["prepare", "--input", str(texts), "--out", str(out)]) == 2


def test_data_sets_with_other_tokenizers_are_not_merged(
    prepared: TokenDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(small_recipe(write_corpus(tmp_path / "texts", 5)), tmp_path / "other", progress=False)
    names = [str(prepared.path), str(tmp_path / "other")]
    assert main(["data", "merge", *names, "--out", str(tmp_path / "out")]) == 2
    assert "have different tokenizers (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def shard(prepared: TokenDataset, tmp_path: Path) -> Path:
    """Documents, of which one does not end with the eod id."""
    with ShardWriter(tmp_path / "shard", prepared.tokenizer.vocab_size) as writer:
        for i in range(20):
            ids = prepared.train.document(i)
            writer.add(ids[:-1] if i == 3 else ids)
        writer.close()
    return tmp_path / "shard"


@pytest.mark.parametrize("append", [False, True])
def test_import(
    prepared: TokenDataset,
    shard: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    append: bool,
) -> None:
    out = str(tmp_path / "out")
    command = ["data", "import", "--train", str(shard), "--tokenizer", str(prepared.path)]
    assert main([*command, "--out", out, *["--append_eod"] * append]) == 0
    capsys.readouterr()
    assert main(["data", "verify", out]) == 0
    told = capsys.readouterr().out
    assert told.count("all but 1 end with") == (0 if append else 1)
    done = open_token_dataset(out)
    both = documents(done.train) + documents(done.valid)
    whole = [prepared.train.document(i).tolist() for i in range(20)]
    expected = whole if append else [ids[:-1] if i == 3 else ids for i, ids in enumerate(whole)]
    assert sorted(both) == sorted(expected)


def test_import_of_every_split(prepared: TokenDataset, shard: Path, tmp_path: Path) -> None:
    splits = [f"--{name}={shard}" for name in ("train", "valid", "test")]
    out = tmp_path / "out"
    assert (
        main(["data", "import", *splits, "--tokenizer", str(prepared.path), "--out", str(out)]) == 0
    )
    done = open_token_dataset(out)
    assert done.test is not None
    assert documents(done.train) == documents(done.valid) == documents(done.test)


def test_a_failed_import_leaves_nothing(
    prepared: TokenDataset, shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = np.fromfile(f"{shard}.bin", "<u2")
    data[100] = prepared.tokenizer.vocab_size
    data.tofile(f"{shard}.bin")
    before = sorted(path.name for path in tmp_path.iterdir())
    command = ["data", "import", "--train", str(shard), "--tokenizer", str(prepared.path)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert f"shard.bin: id {prepared.tokenizer.vocab_size} is outside" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seed", "9223372036854775808"], '"seed" is 9223372036854775808'),
        (["--validation_fraction", "nan"], '"validation_fraction" is nan'),
        (["--validation_fraction", "7"], '"validation_fraction" is 7.0'),
        (["--eod", "<nothing>"], 'has no "<nothing>" token'),
    ],
)
def test_wrong_numbers_for_import(
    prepared: TokenDataset,
    shard: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    command = ["data", "import", "--train", str(shard), "--tokenizer", str(prepared.path)]
    assert main([*command, "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def two_ends(folder: Path) -> Path:
    """A tokenizer with two tokens that can end a document."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>", "<end>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(["some words"], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_the_eod_that_was_named_stays_the_eod(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = two_ends(tmp_path / "tok")
    with ShardWriter(tmp_path / "shard", 300) as writer:
        for i in range(10):
            writer.add(np.array([5 + i, 6, 1]))
        writer.close()
    for name in ("<end>", "</s>"):
        command = ["data", "import", f"--train={tmp_path / 'shard'}", f"--tokenizer={place}"]
        assert main([*command, "--eod", name, "--out", str(tmp_path / name[-2])]) == 0
        done = open_token_dataset(tmp_path / name[-2])
        assert done.tokenizer.eod == name
        assert done.tokenizer.eod_id == done.card.tokenizer.eod_id
    told = capsys.readouterr().out
    assert "documents do not end with the eod id; --append_eod appends it" in told
    both = [str(tmp_path / "d"), str(tmp_path / "s")]
    assert main(["data", "merge", *both, "--out", str(tmp_path / "both")]) == 2
    assert "have different tokenizers (" in capsys.readouterr().err
    assert main(["data", "merge", both[0], both[0], "--out", str(tmp_path / "both")]) == 2
    assert "named twice" in capsys.readouterr().err


def test_a_merge_of_data_sets_with_other_split_rules_prints_a_note(
    prepared: TokenDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_corpus(tmp_path / "texts", documents=20)
    spec = TokenizerSpec(path=str(prepared.path))
    prepare(small_recipe(texts, tokenizer=spec, seed=9), tmp_path / "other", progress=False)
    both = [str(prepared.path), str(tmp_path / "other")]
    assert main(["data", "merge", *both, "--out", str(tmp_path / "out")]) == 0
    assert "different seeds or fractions, so validation text" in capsys.readouterr().out


def test_text_cannot_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one \x1b[2J\x1b]0;title\x07 end")
    (tmp_path / "b.txt").write_text("two \x1b[2J end")
    prepare(small_recipe(tmp_path), tmp_path / "out", progress=False)
    assert main(["data", "inspect", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told and "\x07" not in told and "end" in told


def test_a_document_index_that_wraps_around(prepared: TokenDataset, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", 10) as writer:
        for _ in range(4):
            writer.add(np.array([1, 2]))
        writer.close()
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    raw[-32:-8] = np.array([2**63 - 1, -(2**63), -1], "<i8").tobytes()
    (tmp_path / "x.idx").write_bytes(raw)
    with pytest.raises(DataError, match="document index does not rise"):
        IndexedTokens(tmp_path / "x")


def test_lengths_beyond_the_format(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", 10) as writer:
        with pytest.raises(DataError, match="has 2147483651 tokens, expected 1 to 2.31 - 1"):
            writer.extend(np.zeros(3), np.array([2**31 + 3]))
        with pytest.raises(DataError, match="3 ids for documents of 2 tokens"):
            writer.extend(np.zeros(3, int), np.array([2]))


def test_an_id_that_is_none_is_refused_when_it_is_read(copy_of: Copy) -> None:
    """A damaged block that is not among the blocks sampled at opening."""
    folder = copy_of()
    opened = open_token_dataset(folder)
    data = np.fromfile(folder / "train.bin", "<u2")
    data[50] = 60_000
    data.tofile(folder / "train.bin")
    with pytest.raises(DataError, match="train.bin: id 60000 is outside 0..399"):
        opened.train.read_ranges(np.array([0]), np.array([100]))
