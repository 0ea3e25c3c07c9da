"""How many tokens a corpus costs: counts of ids by source, and statistics of each tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from fgpt.prepare.learn_tokenizer import require_documents, sample_size, spread_tasks
from fgpt.prepare.progress import MB, Reporter
from fgpt.prepare.sources.corpus import Corpus, Tally, documents
from fgpt.prepare.sources.decode import Document
from fgpt.tokenizer.base import BATCH_BYTES, Tokenizer
from fgpt.tokenizer.encoders import choose_encoder

TOTAL = "total"
OTHERS = "(others)"
MAX_SOURCES = 64


@dataclass
class TextCounts:
    """Size of the documents of one source."""

    documents: int = 0
    """Number of documents."""
    bytes: int = 0
    """Number of UTF-8 bytes."""
    characters: int = 0
    """Number of characters."""
    words: int = 0
    """Number of words, separated by whitespace."""

    def add(self, document: Document) -> None:
        """Count a document."""
        text = document.text
        self.documents += 1
        self.bytes += len(document.data)
        self.characters += len(text)
        self.words += len(text.split())


@dataclass
class IdCounts:
    """How often each id occurs, by source."""

    tokenizer: Tokenizer
    """The tokenizer."""
    encoder: str
    """The encoder used, and why."""
    by_source: dict[str, np.ndarray] = field(default_factory=dict)
    """Source -> int64 [vocab_size]."""

    def add(self, source: str, ids: np.ndarray) -> None:
        """Count ids of a source."""
        size = self.tokenizer.vocab_size
        counts = self.by_source.setdefault(source, np.zeros(size, dtype=np.int64))
        counts += np.bincount(ids, minlength=size)


@dataclass(frozen=True)
class SourceStats:
    """Statistics of one source with one tokenizer."""

    source: str
    """Folder or file at the top of the corpus."""
    tokenizer: str
    """The tokenizer, as given by the user."""
    documents: int
    """Number of documents."""
    bytes: int
    """Number of UTF-8 bytes."""
    tokens: int
    """Number of tokens, without the eod tokens."""
    bytes_per_token: float
    """UTF-8 bytes per token."""
    characters_per_token: float
    """Characters per token."""
    tokens_per_word: float
    """Tokens per word; a text without blanks is one word."""
    vocabulary_used: float
    """Share of the vocabulary that occurs (0 .. 1)."""
    unknown: int
    """Number of unknown tokens: their text is lost."""
    in_bytes: float
    """Share of the tokens that stand for a byte or a part of a character (0 .. 1)."""
    coverage: float
    """Share of the characters that are inside tokens of whole characters (0 .. 1); an unknown token
    counts as one character."""


def count_ids(
    tokenizers: Sequence[Tokenizer], corpus: Corpus, limit_mb: int, report: Reporter
) -> tuple[dict[str, TextCounts], list[IdCounts]]:
    """Encode up to `limit_mb` MB of a corpus with each tokenizer. Raises DataError."""
    limit = int(limit_mb * MB)
    texts: dict[str, TextCounts] = {}
    counts: list[IdCounts] = []
    encoders, sources = [], set[str]()
    with report.watch("measure", sample_size(corpus, limit)) as progress:
        for batch in _batches(corpus, limit):
            if not counts:
                for tokenizer in tokenizers:
                    spec, why = choose_encoder(tokenizer, _sample(batch))
                    encoders.append(spec.build())
                    counts.append(IdCounts(tokenizer, why))
            for source, group in groupby(batch, lambda document: _source(document, sources)):
                members = list(group)
                for document in members:
                    texts.setdefault(source, TextCounts()).add(document)
                data = [document.data for document in members]
                for encoder, count in zip(encoders, counts, strict=True):
                    count.add(source, encoder.encode(data)[0])
            progress.advance(sum(len(document.data) for document in batch))
    return texts, counts


def compute_stats(name: str, texts: dict[str, TextCounts], counts: IdCounts) -> list[SourceStats]:
    """Return the statistics of each source, largest first, then of all sources together."""
    tokenizer = counts.tokenizer
    partial = np.array([_partial_characters(tokenizer, i) for i in range(tokenizer.vocab_size)])
    by_size = sorted(texts, key=lambda source: (-texts[source].bytes, source))
    total = TextCounts(
        documents=sum(text.documents for text in texts.values()),
        bytes=sum(text.bytes for text in texts.values()),
        characters=sum(text.characters for text in texts.values()),
        words=sum(text.words for text in texts.values()),
    )
    rows = [(source, texts[source], counts.by_source[source]) for source in by_size]
    rows.append((TOTAL, total, np.sum(list(counts.by_source.values()), axis=0)))
    return [_source_stats(name, *row, tokenizer, partial) for row in rows]


def _source_stats(
    name: str,
    source: str,
    text: TextCounts,
    ids: np.ndarray,
    tokenizer: Tokenizer,
    partial: np.ndarray,
) -> SourceStats:
    """`ids` int64 [vocab_size]: counts; `partial` int [vocab_size]: see `_partial_characters`."""
    tokens = int(ids.sum())
    unknown = int(ids[tokenizer.unk_id]) if tokenizer.unk_id is not None else 0
    uncovered = unknown + (ids * np.maximum(partial, 0)).sum()
    return SourceStats(
        source=source,
        tokenizer=name,
        documents=text.documents,
        bytes=text.bytes,
        tokens=tokens,
        bytes_per_token=text.bytes / tokens,
        characters_per_token=text.characters / tokens,
        tokens_per_word=tokens / max(1, text.words),
        vocabulary_used=float((ids > 0).mean()),
        unknown=unknown,
        in_bytes=float(ids[partial >= 0].sum() / tokens),
        coverage=float(max(0.0, 1 - uncovered / text.characters)),
    )


def _partial_characters(tokenizer: Tokenizer, i: int) -> int:
    """Return how many characters start in token `i` but are not complete in it; -1 if the token
    consists of whole characters.
    """
    data = tokenizer.token_bytes(i)
    started = sum(byte & 0xC0 != 0x80 for byte in data)
    if i in tokenizer.byte_ids:
        return started
    try:
        data.decode()
    except UnicodeDecodeError:
        return started - len(data.decode(errors="ignore"))
    return -1


def _batches(corpus: Corpus, limit: int) -> Iterator[list[Document]]:
    """Yield documents from all over the corpus in batches. Raises DataError if there are none."""
    tally, batch, size = Tally(), [], 0
    for document in documents(corpus, tally, spread_tasks(corpus, limit)):
        batch.append(document)
        size += len(document.data)
        if size >= BATCH_BYTES or tally.bytes >= limit:
            yield batch
            batch, size = [], 0
        if tally.bytes >= limit:
            break
    require_documents(corpus, tally)
    if batch:
        yield batch


def _sample(batch: list[Document]) -> list[bytes]:
    """Return the beginnings of some documents, to compare encoders on."""
    some = batch[:: max(1, len(batch) // 32)]
    return [document.data[: 2**13].decode(errors="ignore").encode() for document in some]


def _source(document: Document, sources: set[str]) -> str:
    """Return the top folder or file of a document; OTHERS beyond the first MAX_SOURCES."""
    top = document.source.split("/", 1)[0]
    if len(sources) < MAX_SOURCES:
        sources.add(top)
    return top if top in sources else OTHERS
