"""What a corpus costs in tokens: counts of ids by source, and the figures that follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from fgpt.prepare.learn_tokenizer import least, need_documents, spread_tasks
from fgpt.prepare.progress import MB, Reporter
from fgpt.prepare.sources.corpus import Corpus, ReadStats, read_documents
from fgpt.prepare.sources.decode import Document
from fgpt.tokenizer.base import BATCH_BYTES, Tokenizer
from fgpt.tokenizer.encoders import choose_encoder

TOTAL = "total"
OTHERS = "(others)"
MOST_SOURCES = 64


@dataclass
class Text:
    """The documents of one source."""

    documents: int = 0
    """Number of documents."""
    bytes: int = 0
    """Their size in UTF-8 bytes."""
    characters: int = 0
    """Number of characters."""
    words: int = 0
    """Number of words: what stands between blanks and line ends."""

    def add(self, document: Document) -> None:
        """Count one document in."""
        text = document.text
        self.documents += 1
        self.bytes += len(document.data)
        self.characters += len(text)
        self.words += len(text.split())


@dataclass(frozen=True)
class Figures:
    """One source by one tokenizer."""

    source: str
    """Folder or file at the top of the corpus."""
    tokenizer: str
    """The tokenizer, as it was named."""
    documents: int
    """Number of documents."""
    bytes: int
    """Their size in UTF-8 bytes."""
    tokens: int
    """Number of tokens, ends of documents not counted."""
    bytes_per_token: float
    """UTF-8 bytes per token."""
    characters_per_token: float
    """Characters per token."""
    tokens_per_word: float
    """Tokens per word; a text without blanks is one word."""
    vocabulary_used: float
    """Share of the vocabulary that occurs (0 .. 1)."""
    unknown: int
    """Tokens that stand for what the vocabulary cannot express: text is lost."""
    in_bytes: float
    """Share of the tokens that stand for a byte, or for a part of a character (0 .. 1)."""
    coverage: float
    """Share of the characters that are in whole tokens, neither unknown nor in parts (0 .. 1); an
    unknown counts as one character."""


@dataclass
class Count:
    """How often each id occurs, by source."""

    tokenizer: Tokenizer
    """The tokenizer."""
    encoder: str
    """Which encoder was used, and why."""
    by_source: dict[str, np.ndarray] = field(default_factory=dict)
    """Source -> int64 [vocab_size]."""

    def add(self, source: str, ids: np.ndarray) -> None:
        """Count ids of a source in."""
        size = self.tokenizer.vocab_size
        counts = self.by_source.setdefault(source, np.zeros(size, dtype=np.int64))
        counts += np.bincount(ids, minlength=size)


def measure(
    tokenizers: Sequence[Tokenizer], corpus: Corpus, limit_mb: int, report: Reporter
) -> tuple[dict[str, Text], list[Count]]:
    """Encode up to `limit_mb` MB of a corpus with each tokenizer. Raises DataError."""
    limit = int(limit_mb * MB)
    texts: dict[str, Text] = {}
    counts: list[Count] = []
    encoders, known = [], set[str]()
    with report.progress_bar("measure", least(corpus.total_bytes, limit)) as going:
        for batch in _batches(corpus, limit):
            if not counts:
                for tokenizer in tokenizers:
                    spec, why = choose_encoder(tokenizer, _sample(batch))
                    encoders.append(spec.build())
                    counts.append(Count(tokenizer, why))
            for source, group in groupby(batch, lambda document: _source(document, known)):
                members = list(group)
                for document in members:
                    texts.setdefault(source, Text()).add(document)
                data = [document.data for document in members]
                for encoder, count in zip(encoders, counts, strict=True):
                    count.add(source, encoder.encode(data)[0])
            going.advance(sum(len(document.data) for document in batch))
    return texts, counts


def figures(name: str, texts: dict[str, Text], count: Count) -> list[Figures]:
    """The figures of each source, largest first, then of all together."""
    cut = np.array([_cut(count.tokenizer, i) for i in range(count.tokenizer.vocab_size)])
    by_size = sorted(texts, key=lambda source: (-texts[source].bytes, source))
    rows = [_row(name, s, texts[s], count.tokenizer, count.by_source[s], cut) for s in by_size]
    whole = Text(
        documents=sum(text.documents for text in texts.values()),
        bytes=sum(text.bytes for text in texts.values()),
        characters=sum(text.characters for text in texts.values()),
        words=sum(text.words for text in texts.values()),
    )
    ids = np.sum(list(count.by_source.values()), axis=0)
    return [*rows, _row(name, TOTAL, whole, count.tokenizer, ids, cut)]


def _row(
    name: str, source: str, text: Text, tokenizer: Tokenizer, ids: np.ndarray, cut: np.ndarray
) -> Figures:
    tokens = int(ids.sum())
    unknown = int(ids[tokenizer.unk_id]) if tokenizer.unk_id is not None else 0
    in_parts = ids[cut >= 0].sum()
    uncovered = unknown + (ids * np.maximum(cut, 0)).sum()
    return Figures(
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
        in_bytes=float(in_parts / tokens),
        coverage=float(max(0.0, 1 - uncovered / text.characters)),
    )


def _cut(tokenizer: Tokenizer, i: int) -> int:
    """How many characters begin in token `i` without being whole there; -1: all of it is whole."""
    data = tokenizer.token_bytes(i)
    begun = sum(byte & 0xC0 != 0x80 for byte in data)
    if i in tokenizer.byte_ids:
        return begun
    try:
        data.decode()
    except UnicodeDecodeError:
        return begun - len(data.decode(errors="ignore"))
    return -1


def _batches(corpus: Corpus, limit: int) -> Iterator[list[Document]]:
    """Documents from all over the corpus, some MB at a time. Raises DataError if there is none."""
    tally, batch, size = ReadStats(), [], 0
    for document in read_documents(corpus, tally, spread_tasks(corpus, limit)):
        batch.append(document)
        size += len(document.data)
        if size >= BATCH_BYTES or tally.bytes >= limit:
            yield batch
            batch, size = [], 0
        if tally.bytes >= limit:
            break
    need_documents(corpus, tally)
    if batch:
        yield batch


def _sample(batch: list[Document]) -> list[bytes]:
    """Beginnings of some documents, to compare encoders on."""
    some = batch[:: max(1, len(batch) // 32)]
    return [document.data[: 2**13].decode(errors="ignore").encode() for document in some]


def _source(document: Document, known: set[str]) -> str:
    """The folder or file at the top, as long as there are not too many of them `known`."""
    top = document.source.split("/", 1)[0]
    if len(known) < MOST_SOURCES:
        known.add(top)
    return top if top in known else OTHERS
