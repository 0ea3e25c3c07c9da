"""How many tokens a corpus costs: counts of ids by source, and statistics of each tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from fgpt.prepare.learn_tokenizer import require_documents, sample_size, spread_tasks
from fgpt.prepare.progress import MB, Reporter
from fgpt.prepare.sources.corpus import Corpus, ReadStats, read_documents
from fgpt.prepare.sources.decode import Document
from fgpt.tokenizer.base import BATCH_BYTES, Tokenizer, encode_batched
from fgpt.tokenizer.encoders import choose_encoder
from fgpt.tokenizer.sentencepiece_model import BLANK

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
    visible: int = 0
    """Number of characters in words."""

    def add(self, document: Document) -> None:
        """Count a document."""
        text = document.text
        words = text.split()
        self.documents += 1
        self.bytes += len(document.data)
        self.characters += len(text)
        self.words += len(words)
        self.visible += sum(map(len, words))


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
    lost: float
    """Share of the characters, blanks aside, that are in no token but the unknown one (0 .. 1)."""
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
    with report.progress_bar("measure", sample_size(corpus, limit)) as progress:
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
    by_size = sorted(texts, key=lambda source: (-texts[source].bytes, source))
    total = TextCounts(
        documents=sum(text.documents for text in texts.values()),
        bytes=sum(text.bytes for text in texts.values()),
        characters=sum(text.characters for text in texts.values()),
        words=sum(text.words for text in texts.values()),
        visible=sum(text.visible for text in texts.values()),
    )
    all_ids = np.sum(list(counts.by_source.values()), axis=0)
    contents = _TokenContents(counts.tokenizer, all_ids)
    rows = [(source, texts[source], counts.by_source[source]) for source in by_size]
    rows.append((TOTAL, total, all_ids))
    return [_source_stats(name, *row, contents) for row in rows]


def text_stats(tokenizer: Tokenizer, texts: Sequence[bytes]) -> SourceStats:
    """Return the statistics of some UTF-8 texts, encoded by the tokenizer's own library."""
    total = TextCounts()
    for data in texts:
        total.add(Document("", data))
    ids, _ = encode_batched(tokenizer.encode_with_library, texts, tokenizer.literals)
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    return _source_stats(tokenizer.kind, TOTAL, total, counts, _TokenContents(tokenizer, counts))


class _TokenContents:
    """The characters in each token that occurs."""

    def __init__(self, tokenizer: Tokenizer, ids: np.ndarray):
        """`ids` int64 [vocab_size]: how often each id occurs."""
        self.unk_id = tokenizer.unk_id
        self.partial = np.full(len(ids), -1)
        """Characters that start but are not complete; -1: all are complete. int64 [vocab_size]."""
        self.visible = np.zeros(len(ids), np.int64)
        """Complete characters except blanks; 0 of the unknown token. int64 [vocab_size]."""
        for i in np.flatnonzero(ids).tolist():
            data = tokenizer.token_bytes(i)
            started = sum(byte & 0xC0 != 0x80 for byte in data)
            complete = "" if i in tokenizer.byte_ids else data.decode(errors="ignore")
            if complete.encode() != data:
                self.partial[i] = started - len(complete)
            if i != tokenizer.unk_id:
                self.visible[i] = sum(not (c.isspace() or c == BLANK) for c in complete)


def _source_stats(
    name: str, source: str, text: TextCounts, ids: np.ndarray, contents: _TokenContents
) -> SourceStats:
    """`ids` int64 [vocab_size]: how often each id occurs."""
    tokens = int(ids.sum())
    unknown = int(ids[contents.unk_id]) if contents.unk_id is not None else 0
    started = int((ids * np.maximum(contents.partial, 0)).sum())
    missing = text.visible - int((ids * contents.visible).sum())
    uncovered = max(unknown + started, missing)
    return SourceStats(
        source=source,
        tokenizer=name,
        documents=text.documents,
        bytes=text.bytes,
        tokens=tokens,
        bytes_per_token=text.bytes / max(1, tokens),
        characters_per_token=text.characters / max(1, tokens),
        tokens_per_word=tokens / max(1, text.words),
        vocabulary_used=float((ids > 0).mean()),
        unknown=unknown,
        lost=max(0, missing - started) / max(1, text.visible),
        in_bytes=float(ids[contents.partial >= 0].sum() / max(1, tokens)),
        coverage=max(0.0, 1 - uncovered / text.characters),
    )


def _batches(corpus: Corpus, limit: int) -> Iterator[list[Document]]:
    """Yield documents from all over the corpus in batches. Raises DataError if there are none."""
    tally, batch, size = ReadStats(), [], 0
    for document in read_documents(corpus, tally, spread_tasks(corpus, limit)):
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
