"""The data card: what a prepared data set is, and the check that it still is what it was.

    DIR/train.bin .idx   valid.bin .idx   [test.bin .idx]   tokenizer.json or .model   card.json

The card is written last and holds no times and no machine paths of its own (the recipe's path is
as the user wrote it): preparing the same thing twice gives the same bytes. Hashes show damage, not
authorship.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import fgpt
from fgpt.data.corpus.base import Tally
from fgpt.data.fields import from_json, read_json
from fgpt.data.files import sha256_file
from fgpt.data.index import dtype_for
from fgpt.data.recipe import Recipe
from fgpt.data.shards import IndexedTokens, ShardInfo, check_bin
from fgpt.data.tokenizer import Tokenizer, load_tokenizer
from fgpt.data.tokenizer.load import tokenizer_file
from fgpt.errors import DataError

FORMAT = 2
CARD_NAME = "card.json"
SPLITS = ("train", "valid", "test")
LIBRARIES = ("numpy", "tokenizers", "sentencepiece")


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


@dataclass(frozen=True)
class Prepared:
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


def open_prepared(path: str | Path, *, verify: bool = False) -> Prepared:
    """Open a data set after checking it against its card: tokenizer, headers, sizes, blocks.

    Of each .bin a few blocks are hashed; `verify` hashes the shards whole (about 1 s per GB).
    Raises DataError naming the file and both values.
    """
    directory = Path(path)
    card = load_card(directory)
    splits = {name: _open_split(directory, name, info, card) for name, info in card.splits.items()}
    _check_hash(tokenizer_file(directory), card.tokenizer.sha256)
    prepared = Prepared(directory, card, splits["train"], splits["valid"], splits.get("test"))
    if verify:
        prepared.verify()
    return prepared


def same_tokenizer(first: DataCard, other: DataCard) -> bool:
    """Whether the ids of two data sets mean the same."""
    special = {card.recipe.tokenizer.special_tokens for card in (first, other)}
    return first.tokenizer == other.tokenizer and len(special) == 1


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


def make_card(
    recipe: Recipe,
    files: int,
    tally: Tally,
    source_sha256: str,
    tokenizer: Tokenizer,
    splits: Mapping[str, ShardInfo],
) -> DataCard:
    """The card of a data set that was just written."""
    tokens = sum(info.tokens for info in splits.values())
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return DataCard(
        format=FORMAT,
        recipe=recipe,
        recipe_sha256=recipe.digest(),
        source=SourceCard(
            files=files,
            documents=tally.documents,
            bytes=tally.bytes,
            sha256=source_sha256,
            empty=tally.empty,
            flawed=tally.flawed,
            flaws=tuple(tally.flaws),
        ),
        tokenizer=TokenizerCard(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id),
        dtype=dtype_for(tokenizer.vocab_size).name,
        bytes_per_token=round(tally.bytes / tokens, 4),
        train=splits["train"],
        valid=splits["valid"],
        test=splits.get("test"),
        versions={"fgpt": fgpt.__version__, "python": platform.python_version(), **versions},
    )
