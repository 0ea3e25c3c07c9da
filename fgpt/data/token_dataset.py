"""A data set opened for reading, after the check that it is what its card says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fgpt.data.card import CARD_NAME, DataCard, load_card
from fgpt.data.shards import IndexedTokens, ShardInfo, check_bin
from fgpt.errors import DataError
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.load import find_tokenizer_file, load_tokenizer
from fgpt.utils.files import sha256_file


@dataclass(frozen=True)
class TokenDataset:
    """An opened data set whose files agree with its card."""

    path: Path
    """Its directory."""
    card: DataCard
    """What it is."""
    train: IndexedTokens
    """Training tokens."""
    valid: IndexedTokens
    """Validation tokens."""
    test: IndexedTokens | None
    """Test tokens, if there are any."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The data set's tokenizer, loaded on first use (its hash was checked at opening)."""
        spec, eod_id = self.card.recipe.tokenizer, self.card.tokenizer.eod_id
        tokenizer = load_tokenizer(self.path, spec.special_tokens, spec.eod)
        if tokenizer.eod_id != eod_id:
            what = f"its tokenizer ends documents with {tokenizer.eod_id}, the card says {eod_id}"
            raise DataError(f"{self.path}: {what}; prepare the data set again")
        return tokenizer

    def check_fits(self, model_vocab_size: int) -> None:
        """Refuse a model whose embedding lacks rows for this data (DataError with the numbers)."""
        vocab_size = self.card.tokenizer.vocab_size
        if vocab_size > model_vocab_size:
            max_id = max(info.max_id for info in self.card.splits.values())
            have = f"vocabulary of {vocab_size} ids (largest id used: {max_id})"
            fix = f"set model.vocab_size >= {vocab_size} or prepare with a smaller vocabulary"
            raise DataError(f"{self.path}: {have}, the model has {model_vocab_size} rows; {fix}")

    def verify(self) -> None:
        """Compare the shards' SHA-256 with the card (reads everything). Raises DataError."""
        for name, info in self.card.splits.items():
            check_bin(self.path / name, info, whole=True)
            _check_hash(self.path / f"{name}.idx", info.idx_sha256)


def open_token_dataset(path: str | Path, *, verify: bool = False) -> TokenDataset:
    """Open a data set after checking it against its card: tokenizer, headers, sizes, blocks.

    Of each .bin a few blocks are hashed; `verify` hashes the shards whole (about 1 s per GB).
    Raises DataError naming the file and both values.
    """
    directory = Path(path)
    card = load_card(directory)
    splits = {name: _open_split(directory, name, info, card) for name, info in card.splits.items()}
    _check_hash(find_tokenizer_file(directory), card.tokenizer.sha256)
    prepared = TokenDataset(directory, card, splits["train"], splits["valid"], splits.get("test"))
    if verify:
        prepared.verify()
    return prepared


def _check_hash(path: Path, wanted: str) -> None:
    try:
        found = sha256_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if found != wanted:
        what = f"SHA-256 {found[:12]}..., but the card says {wanted[:12]}..."
        raise DataError(f"{path}: {what}; prepare the data set again")


def _open_split(directory: Path, name: str, info: ShardInfo, card: DataCard) -> IndexedTokens:
    tokens = IndexedTokens(directory / name, card.tokenizer.vocab_size)
    facts = (
        ("dtype", tokens.dtype.name, card.dtype),
        ("tokens", tokens.tokens, info.tokens),
        ("documents", tokens.document_count, info.documents),
        ("bytes of .bin", tokens.tokens * tokens.dtype.itemsize, info.bin_bytes),
        ("bytes of .idx", (directory / f"{name}.idx").stat().st_size, info.idx_bytes),
    )
    for what, found, wanted in facts:
        if found != wanted:
            place = directory / name
            raise DataError(f"{place}: {what}: {found}, but the card says {wanted}; prepare again")
    if not 0 <= info.max_id < card.tokenizer.vocab_size:
        what = f"max_id {info.max_id} with a vocabulary of {card.tokenizer.vocab_size}"
        raise DataError(f"{directory / CARD_NAME}: {name}: {what}; prepare the data set again")
    check_bin(directory / name, info, whole=False)
    return tokens
