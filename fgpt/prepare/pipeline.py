"""Preparation: recipe -> data set.

1. lock        one writer per output directory; leftovers of killed runs are removed
2. tokenizer   the recipe's, or learned from (a sample of) the corpus
3. encoder     the fastest that gives the tokenizer's ids on a sample of this corpus
4. encode      workers turn tasks into parts, kept beside OUT (workers.py, parts.py)
5. assemble    parts in order -> splits by content hash, while others are still made (assemble.py)
6. commit      fsync all files beside OUT, card last, then rename to OUT (workspace.py)

OUT is always a complete data set. After a kill, a full disk or Ctrl-C the same command continues
from the finished parts and writes the same bytes. Memory: a batch of text per worker, 4 bytes per
document, about 1 KB per file; the corpus may be larger than memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from fgpt.data.card import CARD_NAME, DataCard
from fgpt.data.recipe import Recipe, check_recipe, load_recipe
from fgpt.data.token_dataset import TokenDataset, open_token_dataset
from fgpt.errors import DataError
from fgpt.prepare.assemble import SplitWriterThread, make_card, source_digest, write_splits
from fgpt.prepare.cache_key import parts_key
from fgpt.prepare.health import count_files, document_stats, report_lines
from fgpt.prepare.learn_tokenizer import learn_tokenizer, require_documents, spread_tasks
from fgpt.prepare.parts import ShardPart, Timing, WorkerConfig, iter_tables
from fgpt.prepare.progress import MB, Reporter
from fgpt.prepare.sources.corpus import CorpusTask, ReadStats, RetryableError, read_documents
from fgpt.prepare.sources.open_corpus import open_corpus
from fgpt.prepare.split import SplitBoundaries, nominal_boundaries, split_boundaries
from fgpt.prepare.tokenizer_report import text_stats
from fgpt.prepare.workers import WorkerPool, make_parts, worker_count
from fgpt.prepare.workspace import Workspace, dataset_lock
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.encoders import EncoderChoice, EncoderSpec, choose_encoder
from fgpt.tokenizer.errors import FastEncoderUnavailable
from fgpt.tokenizer.load import load_tokenizer
from fgpt.utils.files import write_atomic

SAMPLE_TASKS = 8
SAMPLE_BYTES = 2**15
HEALTH_BYTES = 2**12
"""Beginning of each document of the sample on which the tokenizer is judged."""
EXPECTED_TOLERANCE = 0.25


def prepare(
    recipe: Recipe,
    out: str | Path,
    *,
    force: bool = False,
    progress: bool = True,
    wait: bool = False,
    workers: int | None = None,
    encoder: EncoderChoice = "auto",
    timing: Timing | None = None,
) -> DataCard:
    """Make the data set `out` (a directory) from `recipe`, unless it is up to date.

    force       replace the data set in `out`
    progress    print to stderr
    wait        wait for another writer of `out` instead of raising
    workers     processes; None: one per core, none for a small corpus; 0: this process
    encoder     auto, fast (raise if it cannot be used) or exact (the tokenizer's own library)
    timing      filled with the time spent

    Only the recipe and its sources determine the bytes. Raises DataError: unusable corpus, another
    data set in `out`, another writer, full disk.
    """
    check_recipe(recipe, recipe.name)
    target = Path(out)
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    if target.name in ("", ".."):
        raise DataError(f'"{out}" is not a name for a new directory; choose another --out')
    try:
        with dataset_lock(target, wait=wait):
            report, timing = Reporter(progress), timing or Timing()
            return Pipeline(recipe, Workspace(target), report, workers, encoder, timing).run(force)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        remedy = "finished parts are kept: run again to continue"
        raise DataError(f"{target}: {reason}; {remedy}") from error


def ensure_prepared(
    path: str | Path, recipe_path: str | Path, *, progress: bool = True
) -> TokenDataset:
    """Open the data set at `path`; if it does not exist, prepare it from the recipe first.

    A missing path whose name is not the recipe's is refused: with a mistyped path, training would
    run on the default corpus. Raises DataError.
    """
    target = Path(path)
    if not (target / CARD_NAME).exists():
        if not os.path.exists(recipe_path):  # the default recipe, in another working directory
            fix = "correct data.path, or make it with fgpt prepare"
            raise DataError(f"{target}: no data set here, and no recipe {recipe_path}; {fix}")
        recipe = load_recipe(recipe_path)
        if target.name != recipe.name:
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                what = "is no token data set, which fgpt prepare makes"
                raise DataError(f"{target}: {what}; correct data.path")
            fix = f"fgpt prepare --recipe {recipe_path} --out {target}"
            problem = f"no data set here, and the recipe has another name, {recipe.name}"
            raise DataError(f"{target}: {problem}; correct data.path, or make it with: {fix}")
        prepare(recipe, target, progress=progress, wait=True)
    return open_token_dataset(target)


class Pipeline:
    """One preparation. The caller holds the lock of the target."""

    def __init__(
        self,
        recipe: Recipe,
        workspace: Workspace,
        report: Reporter,
        workers: int | None,
        encoder: EncoderChoice,
        timing: Timing,
    ):
        self.recipe, self.workspace, self.report = recipe, workspace, report
        self.requested_encoder, self.timing = encoder, timing
        self.corpus = open_corpus(recipe.source, recipe.errors)
        self.workers = worker_count(workers, self.corpus.total_bytes)
        self.health: list[str] = []
        """Lines about the new data set, for the user."""

    def run(self, force: bool) -> DataCard:
        """See `prepare`."""
        self.workspace.remove_leftovers()
        if not force and (self.workspace.target / CARD_NAME).exists():
            return self._existing_card()
        self.workspace.check_target()
        with closing(WorkerPool(self.workers)) as pool:
            if self.recipe.tokenizer.path is not None:
                pool.prestart(self.corpus.total_bytes)  # while the tokenizer is loaded
            fingerprint = "" if self._named_tokenizer is None else self._named_tokenizer.fingerprint
            key = parts_key(self.recipe, self.corpus.stamp(), fingerprint, self.requested_encoder)
            try:
                card = self._make(key, pool)
            except RetryableError:
                raise
            except DataError:
                # The user must change the corpus or the recipe; the parts would not match it.
                self.workspace.delete_parts()
                raise
        self.report.print(f"{self.workspace.target}: {card.summary()}")
        for line in self.health:
            self.report.print(f"  {line}")
        expected = self.recipe.expected_tokens or card.tokens
        if abs(card.tokens - expected) > EXPECTED_TOLERANCE * expected:
            self.report.print(f"  note: the recipe expects about {expected} tokens")
        return card

    def _make(self, key: tuple[str, ...], pool: WorkerPool) -> DataCard:
        corpus, workspace = self.corpus, self.workspace
        size = "" if corpus.total_bytes is None else f", {corpus.total_bytes / MB:.1f} MB"
        what = f"{corpus.files} files" if corpus.files else corpus.label
        self.report.print(f"prepare {self.recipe.name}: {what}{size}")
        if corpus.left_out:
            self.report.print(f"  not read, by suffix: {count_files(corpus.left_out)}")
        if corpus.other_splits:
            splits = ", ".join(corpus.other_splits)
            self.report.print(f"  not read: split {splits}; --dataset with --split reads it")
        workspace.open_parts(key)
        tokenizer = self._tokenizer()
        requested: EncoderChoice = "exact" if workspace.is_exact else self.requested_encoder
        # while the encoder is chosen, start the workers and send them the likely choice
        pool.prestart(corpus.total_bytes)
        sample = self._sample()
        spec, reason = choose_encoder(
            tokenizer,
            sample,
            requested,
            lambda spec: pool.configure(self._worker_config(tokenizer, spec)),
        )
        self.timing.encoder = reason
        self.report.print(f"  encoder: {reason}")
        try:
            return self._encode_and_assemble(tokenizer, spec, pool, sample)
        except FastEncoderUnavailable as error:
            if self.requested_encoder == "fast":
                problem = f"the fast encoder cannot be used: {error}"
                raise DataError(f"{problem}; choose auto or exact") from error
            self.report.print(f"  encoder: {error}; starting again with the exact encoder")
        workspace.restart_exact(key)
        if self.recipe.tokenizer.path is None:
            tokenizer.save(workspace.parts_dir)
        exact, _ = choose_encoder(tokenizer, [], "exact")
        return self._encode_and_assemble(tokenizer, exact, WorkerPool(self.workers), sample)

    @cached_property
    def _named_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the recipe names, None if it is to be learned."""
        path = self.recipe.tokenizer.path
        return None if path is None else self._load_tokenizer(path)

    def _load_tokenizer(self, path: str | Path) -> Tokenizer:
        spec = self.recipe.tokenizer
        return load_tokenizer(path, spec.special_tokens, spec.eod)

    def _tokenizer(self) -> Tokenizer:
        """Return the recipe's tokenizer; a learned one is saved beside the parts."""
        if self._named_tokenizer is not None:
            named = self._named_tokenizer
            self.report.print(f"  end of document: {named.eod}, id {named.eod_id} of {named.kind}")
            return named
        for saved in self.workspace.parts_dir.glob("tokenizer.*"):
            return self._load_tokenizer(saved)
        tokenizer = learn_tokenizer(self.recipe.tokenizer, self.corpus, self.report)
        tokenizer.save(self.workspace.parts_dir)
        return tokenizer

    def _sample(self) -> list[bytes]:
        """Return beginnings of documents from all of the corpus, to compare encoders on."""
        sample: list[bytes] = []
        is_size_known = self.corpus.total_bytes is not None
        tasks = spread_tasks(self.corpus, 0, SAMPLE_TASKS)
        for task in islice(tasks, SAMPLE_TASKS if is_size_known else 1):
            size = 0
            for document in read_documents(self.corpus, ReadStats(), [task]):
                sample.append(document.data[:SAMPLE_BYTES].decode(errors="ignore").encode())
                size += len(sample[-1])
                if size >= SAMPLE_BYTES:
                    break
        return sample

    def _encode_and_assemble(
        self, tokenizer: Tokenizer, spec: EncoderSpec, pool: WorkerPool, sample: list[bytes]
    ) -> DataCard:
        """Make the parts, and the data set from them; `sample`: beginnings of documents.

        Raises FastEncoderUnavailable if the fast encoder fails or gives other ids than the library.
        """
        recipe, workspace = self.recipe, self.workspace
        # the boundaries are final only when all keys are known, but nearly always the nominal ones
        nominal = nominal_boundaries(recipe.validation_fraction, recipe.test_fraction)
        finished = workspace.load_parts()
        if finished:
            self.report.print(f"  {len(finished)} parts are finished already")
        with workspace.staging_directory() as folder:
            vocab_size = tokenizer.vocab_size
            write = partial(write_splits, workspace.parts_dir, vocab_size=vocab_size, out=folder)
            with SplitWriterThread(partial(write, boundaries=nominal)) as writer:
                config = self._worker_config(tokenizer, spec)
                name = spec.name or tokenizer.library_name
                parts = self._make_parts("encode", config, finished, pool, name, writer.add)
                stats, boundaries = self._check_corpus(parts)
                splits = writer.result()
            if boundaries != nominal:
                splits = write(parts, boundaries=boundaries)
            tokenizer.save(folder)
            digest = source_digest(workspace.parts_dir, parts)
            card = make_card(recipe, self.corpus.files, stats, digest, tokenizer, splits)
            documents = document_stats(iter_tables(workspace.parts_dir, parts), stats.documents)
            beginnings = (text[:HEALTH_BYTES].decode(errors="ignore").encode() for text in sample)
            text = text_stats(tokenizer, list(beginnings))
            self.health = list(report_lines(card, documents, text, self.corpus.left_out))
            write_atomic(folder / CARD_NAME, card.to_json())
        return card

    def _worker_config(self, tokenizer: Tokenizer, spec: EncoderSpec) -> WorkerConfig:
        parts_dir, eod_id = self.workspace.parts_dir, tokenizer.eod_id
        seed, vocab_size = self.recipe.seed, tokenizer.vocab_size
        return WorkerConfig(self.corpus, seed, parts_dir, spec, eod_id, vocab_size)

    def _make_parts(
        self,
        title: str,
        config: WorkerConfig,
        finished: dict[int, ShardPart],
        pool: WorkerPool,
        encoder: str = "",
        on_part: Callable[[ShardPart], None] = lambda part: None,
    ) -> list[ShardPart]:
        """Make the unfinished parts; returns all parts in order. `on_part` gets them in any order.

        Raises FastEncoderUnavailable.
        """
        sizes: list[int] = []

        def unfinished() -> Iterator[CorpusTask]:
            for task in self.corpus.tasks():
                sizes.append(task.size_bytes)
                part = finished.get(task.number)
                if part is not None and part.task_digest == task.digest:
                    bar.finished_bytes += task.size_bytes
                    on_part(part)
                else:
                    yield task

        new: list[ShardPart] = []
        with self.report.progress_bar(title, self.corpus.total_bytes, by_tasks=True) as bar:
            making = make_parts(config, unfinished(), pool, bar.advance)
            with closing(pool), closing(making):
                for part in making:
                    if part.mismatch:
                        raise FastEncoderUnavailable(part.mismatch)
                    new.append(part)
                    bar.finished_bytes += sizes[part.number]
                    on_part(part)
            bar.note = self.timing.summarize(new, pool.size, encoder)
        parts = finished | {part.number: part for part in new}
        return [parts[number] for number in range(len(sizes))]

    def _check_corpus(self, parts: list[ShardPart]) -> tuple[ReadStats, SplitBoundaries]:
        """Return the statistics and split boundaries. Raises DataError for an unusable corpus."""
        stats = ReadStats()
        for part in parts:
            stats.add(part.stats)
        require_documents(self.corpus, stats)
        if self.corpus.has_changed():
            raise DataError(f"{self.corpus.label}: the corpus changed while it was read; run again")
        recipe, parts_dir = self.recipe, self.workspace.parts_dir
        boundaries = split_boundaries(
            recipe.validation_fraction,
            recipe.test_fraction,
            lambda: ((t["key"], t["tokens"]) for t in iter_tables(parts_dir, parts)),
        )
        return stats, boundaries

    def _existing_card(self) -> DataCard:
        """Return the card of the target. Raises DataError unless it is up to date."""
        target, recipe = self.workspace.target, self.recipe
        card = open_token_dataset(target).card
        remedy = "--force replaces it, or choose another --out"
        if card.recipe_sha256 != recipe.digest():
            problem = f"holds data of recipe {card.recipe.name} with other settings"
            raise DataError(f"{target}: {problem}; {remedy}")
        tokenizer = self._named_tokenizer
        if tokenizer is not None and tokenizer.fingerprint != card.tokenizer.sha256:
            path = recipe.tokenizer.path
            raise DataError(f"{target}: was encoded with another tokenizer than {path}; {remedy}")
        if not recipe.source.streaming and self._digest_sources() != card.source.sha256:
            raise DataError(f"{target}: its sources changed after it was prepared; {remedy}")
        self.report.print(f"{target}: up to date, nothing to do ({card.summary()})")
        return card

    def _digest_sources(self) -> str:
        """Return the `source_digest` of the present sources."""
        workspace = self.workspace
        try:
            workspace.open_parts(("compare", str(self.recipe.seed), self.corpus.stamp()))
            config = WorkerConfig(self.corpus, self.recipe.seed, workspace.parts_dir, encoder=None)
            pool, finished = WorkerPool(self.workers), workspace.load_parts()
            parts = self._make_parts("compare with sources", config, finished, pool)
            return source_digest(workspace.parts_dir, parts)
        finally:
            workspace.delete_parts()
