"""Opening data sets for reading: one (TokenDataset), or several blended by weight (BlendedDataset).

Opening checks every file against the card, so each start of a run does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fgpt.config.field_syntax import parse_blend
from fgpt.data.best_fit import BestFitSamples
from fgpt.data.blend import BlendedSamples
from fgpt.data.card import CARD_NAME, DataCard, have_same_tokenizer, load_card
from fgpt.data.samples import EpochSamples, Samples, StreamSamples
from fgpt.data.shards import IndexedTokens, ShardInfo, sampled_sha256
from fgpt.errors import DataError
from fgpt.utils.files import sha256_file

if TYPE_CHECKING:
    from fgpt.config.schema import DataConfig
    from fgpt.tokenizer.base import Tokenizer

_PACKINGS: dict[str, type[EpochSamples]] = {"stream": StreamSamples, "best_fit": BestFitSamples}


@dataclass(frozen=True)
class TokenDataset:
    """An opened data set whose files agree with its card."""

    path: Path
    card: DataCard
    train: IndexedTokens
    valid: IndexedTokens
    test: IndexedTokens | None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The data set's tokenizer, loaded on first use (its hash was checked at opening)."""
        return load_card_tokenizer(self.path, self.card)

    def usage(self, seq_len: int, n_samples: float, share: str = "") -> str:
        """One line: the size, and the epochs in `n_samples` samples after `share`."""
        card = self.card
        epochs = n_samples / max(1, self.train.tokens // seq_len - 1)
        repeated = ": repeated" if epochs > 1 else ""
        return (
            f"{self.path}: {card.train.tokens:,} training and {card.valid.tokens:,}"
            f" validation tokens, vocabulary {card.tokenizer.vocab_size:,}; {share}"
            f"{epochs:.3g} epochs{repeated}"
        )

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise DataError if the model's embedding has fewer rows than the vocabulary has ids."""
        check_vocabulary(self.path, self.card, model_vocab_size)


def check_vocabulary(path: Path, card: DataCard, model_vocab_size: int) -> None:
    """Raise DataError if a model has fewer rows than the vocabulary of a data set has ids."""
    vocab_size = card.tokenizer.vocab_size
    if vocab_size > model_vocab_size:
        max_id = max(info.max_id for info in card.splits.values())
        ids = f"vocabulary of {vocab_size} ids (largest id used: {max_id})"
        fix = f"set model.vocab_size >= {vocab_size} or prepare with a smaller vocabulary"
        raise DataError(f"{path}: {ids}, the model has {model_vocab_size} rows; {fix}")


def load_card_tokenizer(directory: Path, card: DataCard) -> Tokenizer:
    """Load the tokenizer of a data set as its card describes it. Raises DataError."""
    from fgpt.tokenizer.load import load_tokenizer  # imports the tokenizer libraries

    spec, eod_id = card.recipe.tokenizer, card.tokenizer.eod_id
    tokenizer = load_tokenizer(directory, spec.special_tokens, spec.eod)
    if tokenizer.eod_id != eod_id and spec.eod is None:
        # the card decides: an older version may have chosen among several such tokens
        eod = tokenizer.id_to_token(eod_id) if eod_id < tokenizer.vocab_size else None
        tokenizer = load_tokenizer(directory, spec.special_tokens, eod)
    if tokenizer.eod_id != eod_id:
        ids = f"the tokenizer's eod id is {tokenizer.eod_id}, but the card says {eod_id}"
        raise DataError(f"{directory}: {ids}; prepare the data set again")
    return tokenizer


@dataclass(frozen=True)
class BlendedDataset:
    """The opened data sets of a run, one or several, all with the same tokenizer."""

    datasets: tuple[TokenDataset, ...]
    weights: tuple[Fraction, ...]  # their shares of the samples, which sum to 1

    @property
    def name(self) -> str:
        return " + ".join(dataset.card.recipe.name for dataset in self.datasets)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.datasets[0].tokenizer

    def fingerprint(self) -> str:
        """Identity of the data, stored in checkpoints: fingerprints, with weights if several."""
        prints = [dataset.card.fingerprint() for dataset in self.datasets]
        if len(prints) == 1:
            return prints[0]
        return ", ".join(f"{w} of {p}" for w, p in zip(self.weights, prints, strict=True))

    def check_fits(self, model_vocab_size: int) -> None:
        for dataset in self.datasets:
            dataset.check_fits(model_vocab_size)

    def samples(self, split: str, options: DataConfig, seq_len: int, *, seed: int) -> Samples:
        """Return the numbered samples of split "train" or "valid". Raises DataError."""
        samples = packed_samples(self.datasets, split, options, seq_len, seed=seed)
        return samples[0] if len(samples) == 1 else BlendedSamples(samples, self.weights, seed=seed)

    def usage(self, seq_len: int, n_samples: int) -> Iterator[str]:
        """Yield one line per data set: its size, and the epochs in `n_samples` samples."""
        for dataset, weight in zip(self.datasets, self.weights, strict=True):
            share = f"{float(weight):.3g} of the samples, " if len(self.datasets) > 1 else ""
            yield dataset.usage(seq_len, float(n_samples * weight), share)

    def stage_identity(self, seq_len: int) -> list[list[int | str]]:
        """Identity of the later stages: [first sample, fingerprint] of each."""
        return []


def packed_samples(
    datasets: Sequence[TokenDataset], split: str, options: DataConfig, seq_len: int, *, seed: int
) -> list[EpochSamples]:
    """Return the numbered samples of a split of each data set. Raises DataError."""
    packing = _PACKINGS[options.packing]
    return [
        packing(getattr(each, split), seq_len, seed=seed, mark_documents=options.document_mask)
        for each in datasets
    ]


def check_same_tokenizer(datasets: Sequence[TokenDataset]) -> None:
    """Raise DataError, naming both, unless all data sets have one tokenizer."""
    first = datasets[0]
    for other in datasets[1:]:
        if not have_same_tokenizer(first.card, other.card):
            raise DataError(
                f"{first.path} and {other.path} have different tokenizers"
                f" ({first.card.describe_tokenizer()} and {other.card.describe_tokenizer()});"
                " prepare one with the other's (--tokenizer, or tokenizer.path in a recipe)"
            )


def open_blended_dataset(
    path: str, open_one: Callable[[str], TokenDataset] | None = None
) -> BlendedDataset:
    """Open the data sets that `data.path`, which was validated, names. Raises DataError.

    `open_one`: instead of `open_token_dataset`.
    """
    named = parse_blend(path)
    datasets = tuple((open_one or open_token_dataset)(each.path) for each in named)
    check_same_tokenizer(datasets)
    total = sum((each.weight for each in named), Fraction(0))
    return BlendedDataset(datasets, tuple(each.weight / total for each in named))


def open_token_dataset(path: str | Path, *, verify: bool = False) -> TokenDataset:
    """Open a data set and check tokenizer, index, sizes and sampled blocks against its card.

    `verify` hashes all of the shards (about 1 s per GB). Raises DataError naming the file and both
    values.
    """
    directory = Path(path)
    card = load_card(directory)
    splits = {name: _open_split(directory, name, info, card) for name, info in card.splits.items()}
    _check_hash(_tokenizer_file(directory), card.tokenizer.sha256)
    if verify:
        for name, info in card.splits.items():
            _check_hash(directory / f"{name}.bin", info.bin_sha256)
            _check_hash(directory / f"{name}.idx", info.idx_sha256)
    return TokenDataset(directory, card, splits["train"], splits["valid"], splits.get("test"))


def _tokenizer_file(directory: Path) -> Path:
    names = ("tokenizer.json", "tokenizer.model")
    files = [directory / name for name in names if (directory / name).exists()]
    if len(files) != 1:
        problem = f"has {len(files)} of tokenizer.json and tokenizer.model, expected one"
        raise DataError(f"{directory}: {problem}; prepare the data set again")
    return files[0]


def _check_hash(path: Path, expected: str, hash_file: Callable[[Path], str] = sha256_file) -> None:
    try:
        actual = hash_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if actual != expected:
        hashes = f"SHA-256 is {actual[:12]}..., but the card says {expected[:12]}..."
        raise DataError(f"{path}: {hashes}; prepare the data set again")


def _open_split(directory: Path, name: str, info: ShardInfo, card: DataCard) -> IndexedTokens:
    prefix = directory / name
    tokens = IndexedTokens(prefix, card.tokenizer.vocab_size)
    facts = (
        ("dtype", tokens.dtype.name, card.dtype),
        ("tokens", tokens.tokens, info.tokens),
        ("documents", tokens.document_count, info.documents),
        ("bytes of .bin", tokens.tokens * tokens.dtype.itemsize, info.bin_bytes),
        ("bytes of .idx", (directory / f"{name}.idx").stat().st_size, info.idx_bytes),
    )
    for fact, actual, expected in facts:
        if actual != expected:
            values = f"{fact}: {actual}, but the card says {expected}"
            raise DataError(f"{prefix}: {values}; prepare the data set again")
    if not 0 <= info.max_id < card.tokenizer.vocab_size:
        values = f"max_id {info.max_id} with a vocabulary of {card.tokenizer.vocab_size}"
        raise DataError(f"{directory / CARD_NAME}: {name}: {values}; prepare the data set again")
    _check_hash(directory / f"{name}.bin", info.bin_sampled_sha256, sampled_sha256)
    return tokens
