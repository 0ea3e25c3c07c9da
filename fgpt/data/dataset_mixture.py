"""The data sets of a run: one, or several blended by weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from fgpt.config.field_syntax import parse_mixture
from fgpt.config.schema import DataConfig
from fgpt.data.card import same_tokenizer
from fgpt.data.samples.best_fit import BestFit
from fgpt.data.samples.blend import Blend, Samples
from fgpt.data.samples.epochs import Epochs, Stream
from fgpt.data.token_dataset import TokenDataset, open_token_dataset
from fgpt.errors import DataError
from fgpt.tokenizer.base import Tokenizer

_PACKINGS: dict[str, type[Epochs]] = {"stream": Stream, "best_fit": BestFit}


@dataclass(frozen=True)
class Mixture:
    """Opened data sets with the same tokenizer."""

    parts: tuple[TokenDataset, ...]
    """The data sets, in the order of data.path."""
    weights: tuple[Fraction, ...]
    """Their shares of the samples, which sum to 1."""

    @property
    def name(self) -> str:
        """For people."""
        return " + ".join(part.card.recipe.name for part in self.parts)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all of them."""
        return self.parts[0].tokenizer

    def fingerprint(self) -> str:
        """Identity of the data, kept in checkpoints; of a single data set its own."""
        if len(self.parts) == 1:
            return self.parts[0].card.fingerprint()
        pairs = zip(self.weights, self.parts, strict=True)
        return ", ".join(f"{weight} of {part.card.fingerprint()}" for weight, part in pairs)

    def check_fits(self, model_vocab_size: int) -> None:
        """Refuse a model whose embedding lacks rows for these data. Raises DataError."""
        for part in self.parts:
            part.check_fits(model_vocab_size)

    def samples(self, split: str, options: DataConfig, seq_len: int, *, seed: int) -> Samples:
        """The numbered samples of split "train" or "valid". Raises DataError."""
        kind = _PACKINGS[options.packing]
        parts = [
            kind(getattr(part, split), seq_len, seed=seed, documents=options.document_mask)
            for part in self.parts
        ]
        return parts[0] if len(parts) == 1 else Blend(parts, self.weights, seed=seed)

    def usage(self, seq_len: int, n_samples: int) -> Iterator[str]:
        """One line for each data set: what it holds, and how often `n_samples` samples use it."""
        for part, weight in zip(self.parts, self.weights, strict=True):
            card = part.card
            share = f"{float(weight):.3g} of the samples, " if len(self.parts) > 1 else ""
            epochs = float(n_samples * weight) / max(1, part.train.tokens // seq_len - 1)
            repeated = ": repeated" if epochs > 1 else ""
            yield (
                f"{part.path}: {card.train.tokens:,} training and {card.valid.tokens:,} validation"
                f" tokens, vocabulary {card.tokenizer.vocab_size:,}; {share}"
                f"{epochs:.3g} epochs{repeated}"
            )


def open_mixture(path: str) -> Mixture:
    """Open what `data.path` names, a text without fault. Raises DataError."""
    named = parse_mixture(path)
    parts = tuple(open_token_dataset(part.path) for part in named)
    for part in parts[1:]:
        if not same_tokenizer(parts[0].card, part.card):
            raise DataError(
                f"{parts[0].path} and {part.path} have different tokenizers"
                f" ({parts[0].card.tokenizer_told()} and {part.card.tokenizer_told()}); prepare one"
                " data set with the other's (tokenizer.path): a blend needs one"
            )
    total = sum((part.weight for part in named), Fraction(0))
    return Mixture(parts, tuple(part.weight / total for part in named))
