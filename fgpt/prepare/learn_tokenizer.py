"""Learn a tokenizer from a corpus, or from tasks all over it where that is enough."""

from __future__ import annotations

from collections.abc import Iterator

from fgpt.errors import DataError
from fgpt.prepare.progress import MB, Reporter
from fgpt.prepare.sources.corpus import Corpus, CorpusTask, ReadStats, read_documents
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer


def learn_tokenizer(spec: TokenizerSpec, corpus: Corpus, report: Reporter) -> Tokenizer:
    """Learn from `spec.sample_mb` of the corpus. Raises DataError."""
    tally, limit = ReadStats(), int(spec.sample_mb * MB)
    with report.progress_bar("learn tokenizer", least(corpus.total_bytes, limit)) as going:

        def texts() -> Iterator[str]:
            for document in read_documents(corpus, tally, spread_tasks(corpus, limit)):
                going.advance(len(document.data))
                yield document.text
                if going.bytes >= limit:
                    break
            need_documents(corpus, tally)

        return train_tokenizer(spec, texts())


def need_documents(corpus: Corpus, tally: ReadStats) -> None:
    """Raise DataError if nothing usable was found in all of the corpus."""
    if tally.documents == 0:
        lost = f"{tally.empty} blank, {tally.flawed} skipped"
        raise DataError(f"{corpus.label}: no document with text in it ({lost})")


def least(total: int | None, limit: int) -> int:
    """The smaller of the two; None is without end."""
    return limit if total is None else min(total, limit)


def spread_tasks(corpus: Corpus, limit_bytes: int, least_tasks: int = 1) -> Iterator[CorpusTask]:
    """Tasks from all over a corpus with about `limit_bytes` of text, at least `least_tasks`.

    Of a corpus of unknown size, its first ones.
    """
    if corpus.total_bytes is None:
        yield from corpus.tasks()
        return
    sizes = [task.size_bytes for task in corpus.tasks()]
    keep = max(least_tasks, round(len(sizes) * limit_bytes / max(1, corpus.total_bytes)))
    for number, task in enumerate(corpus.tasks()):
        if number * keep // len(sizes) != (number - 1) * keep // len(sizes) or keep >= len(sizes):
            yield task
