"""Data that does not fit the model, or is not what its card says, is refused at the door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fgpt.data.token_dataset import TokenDataset, open_token_dataset
from fgpt.errors import DataError
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer

Copy = Callable[[], Path]


def edit(folder: Path, *keys: str, value: Any) -> None:
    card = json.loads((folder / "card.json").read_bytes())
    place = card
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / "card.json").write_text(json.dumps(card))


def test_card_survives_its_own_json(prepared: TokenDataset) -> None:
    again = open_token_dataset(prepared.path, verify=True)
    assert again.card == prepared.card
    assert (prepared.path / "card.json").read_bytes() == prepared.card.to_json()


def test_card_says_what_is_there(prepared: TokenDataset) -> None:
    card = prepared.card
    assert card.dtype == "uint16"
    assert card.train.documents + card.valid.documents == card.source.documents == 80
    assert card.train.tokens == prepared.train.tokens
    total = card.train.tokens + card.valid.tokens
    assert card.bytes_per_token == pytest.approx(card.source.bytes / total, abs=1e-4)
    assert card.train.max_id < card.tokenizer.vocab_size == 400


def test_model_with_too_few_rows(prepared: TokenDataset) -> None:
    prepared.check_fits(400)
    prepared.check_fits(50_000)
    with pytest.raises(DataError, match="vocabulary of 400 ids .*the model has 399 rows"):
        prepared.check_fits(399)


def test_another_tokenizer(copy_of: Copy) -> None:
    folder = copy_of()
    train_tokenizer(TokenizerSpec(300), ["other text"]).save(folder)
    with pytest.raises(DataError, match="tokenizer.json: SHA-256 .*but the card says"):
        open_token_dataset(folder)


@pytest.mark.parametrize("name", ["train.bin", "valid.bin", "train.idx", "valid.idx"])
def test_one_flipped_bit_is_found_by_verify(copy_of: Copy, name: str) -> None:
    folder = copy_of()
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=name.split(".")[0]):
        open_token_dataset(folder, verify=True)


def test_splits_exchanged(copy_of: Copy) -> None:
    folder = copy_of()
    for suffix in (".bin", ".idx"):
        (folder / f"train{suffix}").rename(folder / "tmp")
        (folder / f"valid{suffix}").rename(folder / f"train{suffix}")
        (folder / "tmp").rename(folder / f"valid{suffix}")
    with pytest.raises(DataError, match="train: tokens: .* but the card says"):
        open_token_dataset(folder)


@pytest.mark.parametrize("name", ["card.json", "train.bin", "train.idx", "tokenizer.json"])
def test_missing_file(copy_of: Copy, name: str) -> None:
    folder = copy_of()
    (folder / name).unlink()
    with pytest.raises(DataError, match=name.replace("card.json", "no card.json")):
        open_token_dataset(folder)


EDITS = {
    "format": (("format",), 1, "card format 1, this FGPT reads 2"),
    "unknown key": (("train", "tokns"), 1, 'unknown key "train.tokns" .did you mean "tokens"'),
    "wrong type": (("train", "tokens"), "12", "\"train.tokens\" is '12'; expected int"),
    "bool for int": (("tokenizer", "eod_id"), True, '"tokenizer.eod_id" is True; expected int'),
    "tokens": (("train", "tokens"), 12, "tokens: .* but the card says 12"),
    "dtype": (("dtype",), "int32", "dtype: uint16, but the card says int32"),
    "documents": (("valid", "documents"), 1, "documents: .* but the card says 1"),
    "max_id": (("train", "max_id"), 400, "max_id 400 with a vocabulary of 400"),
    "negative max_id": (("valid", "max_id"), -1, "max_id -1 with a vocabulary of 400"),
    "split is a list": (("train",), [], "train: expected an object, found list"),
}


@pytest.mark.parametrize("case", EDITS)
def test_edited_card(copy_of: Copy, case: str) -> None:
    keys, value, message = EDITS[case]
    folder = copy_of()
    edit(folder, *keys, value=value)
    with pytest.raises(DataError, match=message):
        open_token_dataset(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1, "format": 1}', "\x00"])
def test_card_that_is_no_card(copy_of: Copy, text: str) -> None:
    folder = copy_of()
    (folder / "card.json").write_text(text)
    with pytest.raises(DataError, match="card.json"):
        open_token_dataset(folder)


def test_fingerprint_is_the_content(prepared: TokenDataset, copy_of: Copy) -> None:
    folder = copy_of()
    edit(folder, "versions", "python", value="4.0")
    edit(folder, "recipe", "source", "path", value="/elsewhere")
    assert open_token_dataset(folder).card.fingerprint() == prepared.card.fingerprint()
    edit(folder, "train", "bin_sha256", value="0" * 64)
    assert open_token_dataset(folder).card.fingerprint() != prepared.card.fingerprint()
