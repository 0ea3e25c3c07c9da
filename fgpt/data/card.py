"""The data card, card.json: the description of a prepared data set, by which opening checks it.

    DIR/train.bin .idx   valid.bin .idx   [test.bin .idx]   tokenizer.json or .model   card.json

The card is written last. It holds no times, and no paths but those written in the recipe: preparing
the same sources twice gives the same bytes. Its hashes detect damage; they do not prove authorship.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fgpt.data.recipe import Recipe
from fgpt.data.shards import ShardInfo
from fgpt.errors import DataError
from fgpt.utils.json_dataclass import from_json, read_json

FORMAT = 2
CARD_NAME = "card.json"
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class SourceCard:
    """The text that was read."""

    files: int
    documents: int
    bytes: int
    sha256: str  # SHA-256 over the documents' hashes (`split.text_hash`), in reading order
    empty: int  # blank documents, which are left out
    flawed: int  # malformed documents and unreadable files, left out by errors = skip
    flaws: tuple[str, ...]  # the first of them, with the reason


@dataclass(frozen=True)
class TokenizerCard:
    """The tokenizer of the data set."""

    sha256: str  # of its file, tokenizer.json or tokenizer.model
    vocab_size: int  # largest possible id + 1
    eod_id: int


@dataclass(frozen=True)
class DataCard:
    """The fields of card.json."""

    format: int
    recipe: Recipe
    recipe_sha256: str
    source: SourceCard
    tokenizer: TokenizerCard
    dtype: str  # type of the stored ids: uint16 or int32
    bytes_per_token: float
    """UTF-8 bytes of text per token, end-of-document ids included; 0 if unknown."""
    train: ShardInfo
    valid: ShardInfo
    test: ShardInfo | None
    versions: dict[str, str]

    def fingerprint(self) -> str:
        """Hash of tokenizer, training and validation data; stored in checkpoints."""
        shards = {"train": self.train, "valid": self.valid}
        content = {
            "tokenizer": self.tokenizer.sha256,
            **{f"{name}.bin": info.bin_sha256 for name, info in shards.items()},
            **{f"{name}.idx": info.idx_sha256 for name, info in shards.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def splits(self) -> dict[str, ShardInfo]:
        splits = {name: getattr(self, name) for name in SPLITS}
        return {name: info for name, info in splits.items() if info is not None}

    @property
    def tokens(self) -> int:
        return sum(info.tokens for info in self.splits.values())

    def summary(self) -> str:
        """Return one line for the user."""
        skipped = f", {self.source.flawed} skipped" if self.source.flawed else ""
        splits = ", ".join(f"{name} {info.tokens}" for name, info in self.splits.items())
        return (
            f"{self.tokens} tokens in {self.source.documents} documents{skipped}; {splits}; "
            f"vocabulary {self.tokenizer.vocab_size}"
            + (f", {self.bytes_per_token:.2f} bytes per token" if self.bytes_per_token else "")
        )

    def describe_tokenizer(self) -> str:
        """Return what distinguishes the tokenizer, for messages."""
        tokenizer, special = self.tokenizer, self.recipe.tokenizer.special_tokens
        return f"{tokenizer.sha256[:12]}..., eod {tokenizer.eod_id}, special tokens as {special}"

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode()


def load_card(directory: Path) -> DataCard:
    """Read DIR/card.json strictly. Raises DataError."""
    path = directory / CARD_NAME
    try:
        is_there = path.exists()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); grant access, or name another folder"
        ) from error
    if not is_there:
        raise DataError(f"{directory}: not a prepared data set (no {CARD_NAME}); run fgpt prepare")
    value = read_json(path)
    if (version := value.get("format")) != FORMAT:
        formats = f"card format is {version!r}, this FGPT reads {FORMAT}"
        raise DataError(f"{path}: {formats}; prepare the data set again")
    return from_json(DataCard, value, str(path))


def have_same_tokenizer(first: DataCard, second: DataCard) -> bool:
    """Return whether the ids of two data sets mean the same."""
    special = {card.recipe.tokenizer.special_tokens for card in (first, second)}
    return first.tokenizer == second.tokenizer and len(special) == 1
