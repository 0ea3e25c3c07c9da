"""Whether a new data set will be of use: figures and warnings at the end of a preparation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fgpt.data.card import DataCard
from fgpt.prepare.split import KEYS, SAMPLE_TOKENS
from fgpt.prepare.tokenizer_report import SourceStats

SAMPLE_LENGTHS = (SAMPLE_TOKENS, 1024)
"""Tokens per sample of the presets: the small ones, and GPT-2."""
ENOUGH_SAMPLES = 4
MAX_KEYS = 2**22
"""Documents whose keys are compared at a time; of more documents, a sample with all its copies."""
MAX_REMEDY, MIN_DOCUMENTS = 0.2, 10
"""Largest fraction that is suggested for a split, and the documents that it must have."""
# shares above which a warning is printed
LOST, IN_BYTES, COPIES, LONGEST = 0.01, 0.2, 0.1, 0.5
LOW_BYTES_PER_TOKEN = 1.5
SMALL_VOCABULARY = 1000
"""Below it, few bytes per token are expected."""


@dataclass(frozen=True)
class DocumentStats:
    """Statistics of all documents."""

    longest: int
    """Tokens of the longest document."""
    copies: float
    """Share of the documents that are copies of an earlier one (0 .. 1)."""


def document_stats(tables: Iterable[np.ndarray], documents: int) -> DocumentStats:
    """Read tables of `documents` documents (`parts.DOCUMENT`), in 8 bytes each up to MAX_KEYS."""
    # keys are hashes of texts, so those below a limit are a sample with all copies of its texts
    limit = min(KEYS - 1, KEYS * MAX_KEYS // max(1, documents))
    longest = 0
    kept: list[np.ndarray] = [np.zeros(0, np.uint64)]
    for table in tables:
        longest = max(longest, int(table["tokens"].max()))
        kept.append(table["key"][table["key"] <= np.uint64(limit)])
    keys = np.sort(np.concatenate(kept))
    copies = np.count_nonzero(keys[1:] == keys[:-1])
    return DocumentStats(longest, copies / max(1, len(keys)))


def report_lines(
    card: DataCard, documents: DocumentStats, sample: SourceStats, left_out: Mapping[str, int]
) -> Iterator[str]:
    """Yield the figures, then the warnings. `sample`: statistics of beginnings of documents;
    `left_out`: suffix -> number of files that were not read.
    """
    small, large = SAMPLE_LENGTHS
    for name, info in card.splits.items():
        samples = f"{_samples(info.tokens, small):,} samples of {small} tokens or"
        samples += f" {_samples(info.tokens, large):,} of {large:,}"
        yield f"{name}: {info.tokens:,} tokens, {samples}"
    unknown = sample.unknown / max(1, sample.tokens)
    yield (
        f"longest document: {documents.longest:,} tokens; copies: {documents.copies:.1%} of the"
        f" documents; in a sample, {unknown:.1%} of the tokens are unknown, {sample.in_bytes:.1%}"
        " bytes or parts of characters"
    )
    for warning in _warnings(card, documents, sample, left_out):
        yield f"warning: {warning}"


def _samples(tokens: int, seq_len: int) -> int:
    """Samples of one epoch, as in `fgpt.data.samples`."""
    return max(0, tokens // seq_len - 1)


def count_files(left_out: Mapping[str, int], shown: int = 5) -> str:
    """Return "12 .json, 3 .png files", the most frequent suffixes first."""
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    others = sum(count for _, count in most[shown:])
    names = [f"{count:,} {suffix}" for suffix, count in most[:shown]]
    return ", ".join(names + [f"{others:,} other"] * (others > 0)) + " files"


def _warnings(
    card: DataCard, documents: DocumentStats, sample: SourceStats, left_out: Mapping[str, int]
) -> Iterator[str]:
    recipe = card.recipe
    if sum(left_out.values()) >= card.source.files > 0:
        remedy = "formats are known by suffix: rename or convert them, or name the right folder"
        if any(suffix.startswith(".json") for suffix in left_out):
            field = recipe.source.text_field
            remedy += f'; .json needs one object with "{field}" per line (--text_field)'
        yield f"{card.source.files:,} files were read, {count_files(left_out)} were not; {remedy}"
    yield from _split_warnings(card, documents)
    if documents.longest > LONGEST * card.tokens:
        yield (
            f"one document has {documents.longest / card.tokens:.0%} of the tokens;"
            " --document_separator divides text files"
        )
    if documents.copies > COPIES:
        yield f"{documents.copies:.0%} of the documents are copies of others; remove them"
    if sample.lost > LOST:
        yield (
            f"{sample.lost:.0%} of the characters in a sample are lost: the tokenizer has no token"
            " for them; choose one that was trained on such text, or let FGPT learn one"
        )
    is_learned, asked = recipe.tokenizer.path is None, recipe.tokenizer.vocab_size
    remedy = "learn one with a larger --vocab_size" if is_learned else "choose another --tokenizer"
    if sample.in_bytes > IN_BYTES:
        yield (
            f"{sample.in_bytes:.0%} of the tokens in a sample are single bytes or parts of"
            f" characters: the tokenizer does not fit the text; {remedy}"
        )
    elif card.bytes_per_token < LOW_BYTES_PER_TOKEN and not (
        is_learned and asked < SMALL_VOCABULARY
    ):
        yield (
            f"{card.bytes_per_token:.2f} bytes per token: the tokenizer does not fit the text"
            " (learning ignores runs of 1,000 or more letters without a blank)"
        )


def _split_warnings(card: DataCard, documents: DocumentStats) -> Iterator[str]:
    recipe = card.recipe
    fractions = {"valid": recipe.validation_fraction, "test": recipe.test_fraction}
    flags = {"valid": "--validation_fraction", "test": "--test_fraction"}
    for name, info in card.splits.items():
        short = [n for n in SAMPLE_LENGTHS if _samples(info.tokens, n) < ENOUGH_SAMPLES]
        if not short or (name == "train" and short[0] > SAMPLE_TOKENS):
            continue
        remedy = "prepare more text, or train with a smaller data.seq_len"
        if name != "train" and documents.longest <= LONGEST * card.tokens:
            # twice what is needed, because a fraction counts documents
            needed = 2 * (ENOUGH_SAMPLES + 1) * short[0] / card.tokens
            fraction = max(math.ceil(100 * needed) / 100, 2 * fractions[name])
            if fraction <= MAX_REMEDY and fraction * card.source.documents >= MIN_DOCUMENTS:
                remedy = f"{flags[name]} {fraction:.2g} --force makes it longer"
        size = f"{info.tokens:,} tokens, fewer than {ENOUGH_SAMPLES} samples of {short[0]:,}"
        yield f"{name} has {size}; {remedy}"
    for name, info in card.splits.items():
        share = info.tokens / card.tokens
        if name != "train" and share > 2 * fractions[name] + 0.2:
            yield (
                f"{name} has {share:.0%} of the tokens, not {fractions[name]:.1%}: the documents"
                " are too few or too unequal; --document_separator divides text files"
            )
