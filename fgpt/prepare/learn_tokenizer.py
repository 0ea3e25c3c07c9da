"""Learn a tokenizer from a sample of a corpus."""

from __future__ import annotations

from collections.abc import Iterator

from fgpt.errors import DataError
from fgpt.prepare.progress import MB, Reporter
from fgpt.prepare.sources.corpus import Corpus, CorpusTask, ReadStats, read_documents
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer


def learn_tokenizer(spec: TokenizerSpec, corpus: Corpus, report: Reporter) -> Tokenizer:
    """Learn from `spec.sample_mb` MB of the corpus. Raises DataError."""
    tally, limit = ReadStats(), int(spec.sample_mb * MB)
    with report.progress_bar("learn tokenizer", sample_size(corpus, limit)) as progress:

        def texts() -> Iterator[str]:
            for document in read_documents(corpus, tally, spread_tasks(corpus, limit)):
                progress.advance(len(document.data))
                yield document.text
                if progress.bytes >= limit:
                    break
            require_documents(corpus, tally)

        tokenizer = train_tokenizer(spec, texts())
    if tokenizer.vocab_size < spec.vocab_size:
        size = f"{tokenizer.vocab_size:,} ids of the {spec.vocab_size:,} asked for"
        report.print(f"  vocab_size not reached: {size}; more text gives more")
    return tokenizer


def require_documents(corpus: Corpus, tally: ReadStats) -> None:
    """Raise DataError if no usable document was read from the corpus."""
    if tally.documents == 0:
        reasons = f"{tally.empty} blank, {tally.flawed} skipped"
        raise DataError(f"{corpus.label}: no document with text in it ({reasons})")


def sample_size(corpus: Corpus, limit_bytes: int) -> int:
    """Return how many bytes a sample of the corpus will have, at most."""
    return limit_bytes if corpus.total_bytes is None else min(corpus.total_bytes, limit_bytes)


def spread_tasks(corpus: Corpus, limit_bytes: int, min_tasks: int = 1) -> Iterator[CorpusTask]:
    """Yield evenly spaced tasks of a corpus with about `limit_bytes` of text, at least `min_tasks`.

    Of a corpus of unknown size, yields all tasks from the start.
    """
    if corpus.total_bytes is None:
        yield from corpus.tasks()
        return
    sizes = [task.size_bytes for task in corpus.tasks()]
    keep = max(min_tasks, round(len(sizes) * limit_bytes / max(1, corpus.total_bytes)))
    for number, task in enumerate(corpus.tasks()):
        if number * keep // len(sizes) != (number - 1) * keep // len(sizes) or keep >= len(sizes):
            yield task
