"""The data card: what a prepared data set is, and the check that it still is what it was.

    DIR/train.bin .idx   DIR/valid.bin .idx   DIR/tokenizer.json (or .model)   DIR/card.json

The card is written last and holds no times and no machine paths of its own (the recipe's path is
as the user wrote it): preparing the same thing twice gives the same bytes. Hashes show damage, not
authorship.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from fgpt.data.fields import from_json, read_json
from fgpt.data.files import sha256_file
from fgpt.data.recipe import Recipe
from fgpt.data.shards import IndexedTokens, ShardInfo
from fgpt.data.tokenizer import Tokenizer, load_tokenizer
from fgpt.data.tokenizer.load import tokenizer_file
from fgpt.errors import DataError

FORMAT = 1
CARD_NAME = "card.json"
SPLITS = ("train", "valid")


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
    """SHA-256 over the documents' own SHA-256s, in reading order."""
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
    """UTF-8 bytes of text per token, end-of-document ids included."""
    train: ShardInfo
    """The training split."""
    valid: ShardInfo
    """The validation split."""
    versions: dict[str, str]
    """Versions of Python and of the libraries that made it."""

    def fingerprint(self) -> str:
        """Identity of the data, kept in checkpoints: content only, no paths, no versions."""
        content = {
            "tokenizer": self.tokenizer.sha256,
            **{f"{s}.bin": self.split(s).bin_sha256 for s in SPLITS},
            **{f"{s}.idx": self.split(s).idx_sha256 for s in SPLITS},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def split(self, name: str) -> ShardInfo:
        """The card's entry for split "train" or "valid"."""
        return {"train": self.train, "valid": self.valid}[name]

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

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The data set's tokenizer, loaded on first use (its hash was checked at opening)."""
        spec = self.card.recipe.tokenizer
        return load_tokenizer(self.path, spec.special_tokens, spec.eod)

    def check_fits(self, model_vocab_size: int) -> None:
        """Refuse a model whose embedding lacks rows for this data (DataError with the numbers)."""
        vocab_size = self.card.tokenizer.vocab_size
        if vocab_size > model_vocab_size:
            max_id = max(self.card.train.max_id, self.card.valid.max_id)
            have = f"vocabulary of {vocab_size} ids (largest id used: {max_id})"
            fix = f"set model.vocab_size >= {vocab_size} or prepare with a smaller vocabulary"
            raise DataError(f"{self.path}: {have}, the model has {model_vocab_size} rows; {fix}")

    def verify(self) -> None:
        """Compare the shards' SHA-256 with the card (reads everything). Raises DataError."""
        for name in SPLITS:
            info = self.card.split(name)
            _check_hash(self.path / f"{name}.bin", info.bin_sha256)
            _check_hash(self.path / f"{name}.idx", info.idx_sha256)


def open_prepared(path: str | Path, *, verify: bool = False) -> Prepared:
    """Open a data set after checking it against its card: tokenizer, headers, sizes.

    `verify` hashes the shards too (reads everything: about 1 s per GB).
    Raises DataError naming the file and both values.
    """
    directory = Path(path)
    card = load_card(directory)
    splits = {name: _open_split(directory, name, card) for name in SPLITS}
    _check_hash(tokenizer_file(directory), card.tokenizer.sha256)
    prepared = Prepared(directory, card, **splits)
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


def _open_split(directory: Path, name: str, card: DataCard) -> IndexedTokens:
    info, tokens = card.split(name), IndexedTokens(directory / name)
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
    return tokens
