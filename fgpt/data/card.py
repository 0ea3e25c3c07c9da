"""The data card: what a prepared data set is. `prepared` checks that it still is what it was.

    DIR/train.bin .idx   valid.bin .idx   [test.bin .idx]   tokenizer.json or .model   card.json

The card is written last and holds no times and no machine paths of its own (the recipe's path is
as the user wrote it): preparing the same thing twice gives the same bytes. Hashes show damage, not
authorship.
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
    """Files of the corpus."""
    documents: int
    """Documents used."""
    bytes: int
    """Their size, in UTF-8 bytes."""
    sha256: str
    """SHA-256 over the hashes of the documents (`split.text_hash`), in reading order."""
    empty: int
    """Documents left out because they were blank."""
    flawed: int
    """Documents and files left out by errors = skip."""
    flaws: tuple[str, ...]
    """The first of them, with the reason."""


@dataclass(frozen=True)
class TokenizerCard:
    """The tokenizer that was used."""

    sha256: str
    """SHA-256 of its file (tokenizer.json or tokenizer.model)."""
    vocab_size: int
    """Largest id it can give, + 1."""
    eod_id: int
    """Id at the end of every document."""


@dataclass(frozen=True)
class DataCard:
    """card.json, field by field."""

    format: int
    """Version of this card."""
    recipe: Recipe
    """The recipe, with every default spelled out."""
    recipe_sha256: str
    """Its digest (Recipe.digest)."""
    source: SourceCard
    """What was read."""
    tokenizer: TokenizerCard
    """What encoded it."""
    dtype: str
    """Type of the stored ids: uint16 or int32."""
    bytes_per_token: float
    """UTF-8 bytes of text per token, end-of-document ids included; 0: not known."""
    train: ShardInfo
    """The training split."""
    valid: ShardInfo
    """The validation split."""
    test: ShardInfo | None
    """The test split, if the recipe asks for one."""
    versions: dict[str, str]
    """Versions of Python and of the libraries that made it."""

    def fingerprint(self) -> str:
        """Identity of the data, kept in checkpoints: content only, no paths, no versions."""
        shards = {"train": self.train, "valid": self.valid}  # a test split is not trained on
        content = {
            "tokenizer": self.tokenizer.sha256,
            **{f"{name}.bin": info.bin_sha256 for name, info in shards.items()},
            **{f"{name}.idx": info.idx_sha256 for name, info in shards.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def splits(self) -> dict[str, ShardInfo]:
        """The splits there are, by name."""
        found = {name: getattr(self, name) for name in SPLITS}
        return {name: info for name, info in found.items() if info is not None}

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(info.tokens for info in self.splits.values())

    def summary(self) -> str:
        """One line for people."""
        skipped = f", {self.source.flawed} skipped" if self.source.flawed else ""
        each = ", ".join(f"{name} {info.tokens}" for name, info in self.splits.items())
        return (
            f"{self.tokens} tokens in {self.source.documents} documents{skipped}; {each}; "
            f"vocabulary {self.tokenizer.vocab_size}"
            + (f", {self.bytes_per_token:.2f} bytes per token" if self.bytes_per_token else "")
        )

    def tokenizer_told(self) -> str:
        """The tokenizer, for messages."""
        tokenizer, special = self.tokenizer, self.recipe.tokenizer.special_tokens
        return f"{tokenizer.sha256[:12]}..., eod {tokenizer.eod_id}, special tokens as {special}"

    def to_json(self) -> bytes:
        """The bytes of card.json."""
        return (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode()


def load_card(directory: Path) -> DataCard:
    """Read DIR/card.json strictly. Raises DataError."""
    path = directory / CARD_NAME
    if not path.exists():
        raise DataError(f"{directory}: not a prepared data set (no {CARD_NAME}); run fgpt prepare")
    value = read_json(path)
    if value.get("format") != FORMAT:
        version = value.get("format")
        raise DataError(f"{path}: card format {version!r}, this FGPT reads {FORMAT}; prepare again")
    return from_json(DataCard, value, str(path))


def same_tokenizer(first: DataCard, other: DataCard) -> bool:
    """Whether the ids of two data sets mean the same."""
    special = {card.recipe.tokenizer.special_tokens for card in (first, other)}
    return first.tokenizer == other.tokenizer and len(special) == 1
