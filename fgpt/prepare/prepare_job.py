"""One run of the pipeline, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from fgpt.data.card import CARD_NAME, DataCard
from fgpt.data.recipe import Recipe
from fgpt.data.token_dataset import open_token_dataset
from fgpt.errors import DataError
from fgpt.prepare.cache_key import parts_key
from fgpt.prepare.learn_tokenizer import learn_tokenizer, require_documents, spread_tasks
from fgpt.prepare.make_card import make_card
from fgpt.prepare.merge import Merging, source_digest, tables, write_splits
from fgpt.prepare.parts import Job, Part, Timing
from fgpt.prepare.progress import MB, Reporter
from fgpt.prepare.sources.corpus import Interrupted, Tally, Task, documents
from fgpt.prepare.sources.open_source import open_corpus
from fgpt.prepare.split import Limits, split_limits, usual_limits
from fgpt.prepare.workers import Crew, make_parts, worker_count
from fgpt.prepare.workspace import Workspace
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.encoders import EncoderChoice, EncoderSpec, choose_encoder
from fgpt.tokenizer.errors import FastEncoderUnavailable
from fgpt.tokenizer.load import load_tokenizer
from fgpt.utils.files import write_atomic

SAMPLE_TASKS = 8
SAMPLE_BYTES = 2**15
EXPECTED_WITHIN = 0.25


class PrepareJob:
    """One run of the pipeline; its lock is held."""

    def __init__(
        self,
        recipe: Recipe,
        space: Workspace,
        report: Reporter,
        workers: int | None,
        encoder: EncoderChoice,
        timing: Timing,
    ):
        self.recipe, self.space, self.report, self.timing = recipe, space, report, timing
        self.workers, self.encoder = workers, encoder
        self.corpus = open_corpus(recipe.source, recipe.errors)

    def run(self, force: bool) -> DataCard:
        """See `prepare`."""
        self.space.clear_leftovers()
        if not force and (self.space.target / CARD_NAME).exists():
            return self._existing()
        self.space.refuse_foreign()
        with closing(self._crew()) as crew:
            if self.recipe.tokenizer.path is not None:
                crew.start(self.corpus.total_bytes)  # while the tokenizer is read
            key = self._key()
            try:
                card = self._make(key, crew)
            except Interrupted:
                raise
            except DataError:
                # the corpus or the recipe must change first, and the parts would not fit it then
                self.space.drop_parts()
                raise
        self.report.say(f"{self.space.target}: {card.summary()}")
        expected = self.recipe.expected_tokens or card.tokens
        if abs(card.tokens - expected) > EXPECTED_WITHIN * expected:
            self.report.say(f"  note: the recipe expects about {expected} tokens")
        return card

    def _key(self) -> tuple[str, ...]:
        given = "" if self._given is None else self._given.fingerprint
        return parts_key(self.recipe, self.corpus.stamp(), given, self.encoder)

    def _make(self, key: tuple[str, ...], crew: Crew) -> DataCard:
        corpus, space = self.corpus, self.space
        size = "" if corpus.total_bytes is None else f", {corpus.total_bytes / MB:.1f} MB"
        self.report.say(f"prepare {self.recipe.name}: {corpus.files or 'no'} files{size}")
        space.open_parts(key)
        tokenizer = self._tokenizer()
        crew.start(corpus.total_bytes)  # while the encoder is chosen

        def expect(spec: EncoderSpec) -> None:
            crew.tell(self._job(tokenizer, spec))

        wanted: EncoderChoice = "exact" if space.is_exact else self.encoder
        spec, why = choose_encoder(tokenizer, self._sample(), wanted, expect)
        self.timing.encoder = why
        self.report.say(f"  encoder: {why}")
        try:
            return self._attempt(tokenizer, spec, crew)
        except FastEncoderUnavailable as fault:
            if self.encoder == "fast":
                what = f"the fast encoder cannot be used: {fault}; choose auto or exact"
                raise DataError(what) from fault
            self.report.say(f"  encoder: {fault}; beginning again, the exact way")
        space.begin_exactly(key)
        if self.recipe.tokenizer.path is None:
            tokenizer.save(space.parts)
        exact, _ = choose_encoder(tokenizer, [], "exact")
        return self._attempt(tokenizer, exact, self._crew())

    def _crew(self) -> Crew:
        return Crew(worker_count(self.workers, self.corpus.total_bytes))

    @cached_property
    def _given(self) -> Tokenizer | None:
        """The tokenizer that the recipe names."""
        path = self.recipe.tokenizer.path
        return None if path is None else self._load(path)

    def _load(self, path: str | Path) -> Tokenizer:
        spec = self.recipe.tokenizer
        return load_tokenizer(path, spec.special_tokens, spec.eod)

    def _tokenizer(self) -> Tokenizer:
        """The recipe's tokenizer; a learned one is kept beside the parts."""
        spec, parts = self.recipe.tokenizer, self.space.parts
        if self._given is not None:
            return self._given
        for kept in parts.glob("tokenizer.*"):
            return self._load(kept)
        tokenizer = learn_tokenizer(spec, self.corpus, self.report)
        tokenizer.save(parts)
        return tokenizer

    def _sample(self) -> list[bytes]:
        """Beginnings of documents all over the corpus, to compare encoders on."""
        found: list[bytes] = []
        known = self.corpus.total_bytes is not None
        tasks = spread_tasks(self.corpus, 0, SAMPLE_TASKS)
        for task in islice(tasks, SAMPLE_TASKS if known else 1):
            size = 0
            for document in documents(self.corpus, Tally(), [task]):
                found.append(document.data[:SAMPLE_BYTES].decode(errors="ignore").encode())
                size += len(found[-1])
                if size >= SAMPLE_BYTES:
                    break
        return found

    def _attempt(self, tokenizer: Tokenizer, spec: EncoderSpec, crew: Crew) -> DataCard:
        """The data set, put together while its parts are made.

        Raises FastEncoderUnavailable for what is wrong with the fast encoder's ids.
        """
        recipe, space = self.recipe, self.space
        usual = usual_limits(recipe.validation_fraction, recipe.test_fraction)
        job = self._job(tokenizer, spec)
        kept = space.finished()
        if kept:
            self.report.say(f"  {len(kept)} parts are finished already")
        with space.putting_together() as tmp:
            write = partial(write_splits, space.parts, vocab_size=tokenizer.vocab_size, out=tmp)
            with Merging(partial(write, limits=usual)) as merging:
                name = spec.name or tokenizer.library_name
                parts = self._pass("encode", job, kept, crew, name, merging.add)
                tally, limits = self._checked(parts)
                splits = merging.result()
            if limits != usual:
                splits = write(parts, limits=limits)
            tokenizer.save(tmp)
            digest = source_digest(space.parts, parts)
            card = make_card(recipe, self.corpus.files, tally, digest, tokenizer, splits)
            write_atomic(tmp / CARD_NAME, card.to_json())
        return card

    def _job(self, tokenizer: Tokenizer, spec: EncoderSpec) -> Job:
        recipe, space = self.recipe, self.space
        eod_id, size = tokenizer.eod_id, tokenizer.vocab_size
        return Job(self.corpus, recipe.seed, space.parts, spec, eod_id, size)

    def _pass(
        self,
        title: str,
        job: Job,
        parts: dict[int, Part],
        crew: Crew,
        encoder: str = "",
        use: Callable[[Part], None] = lambda part: None,
    ) -> list[Part]:
        """Make the parts that are not there; all of them, in order. `use` is told each, in any.

        Raises FastEncoderUnavailable.
        """
        total, sizes = self.corpus.total_bytes, list[int]()

        def missing() -> Iterator[Task]:
            for task in self.corpus.tasks():
                sizes.append(task.size_bytes)
                kept = parts.get(task.number)
                if kept is not None and kept.input == task.digest:
                    going.finished_bytes += task.size_bytes
                    use(kept)
                else:
                    yield task

        new: list[Part] = []
        with self.report.watch(title, total, by_tasks=True) as going:
            made = make_parts(job, missing(), crew, going.advance)
            with closing(crew), closing(made) as coming:
                for part in coming:
                    if part.fault:
                        raise FastEncoderUnavailable(part.fault)
                    new.append(part)
                    going.finished_bytes += sizes[part.number]
                    use(part)
            going.note = self.timing.told(new, crew.count, encoder)
        found = parts | {part.number: part for part in new}
        return [found[number] for number in range(len(sizes))]

    def _checked(self, parts: list[Part]) -> tuple[Tally, Limits]:
        """What was read, and where the splits end. Raises DataError if it is no corpus."""
        tally = Tally()
        for part in parts:
            tally.add(part.tally)
        require_documents(self.corpus, tally)
        if self.corpus.has_changed():
            raise DataError(f"{self.corpus.label}: the corpus changed while it was read; run again")
        recipe, folder = self.recipe, self.space.parts
        limits = split_limits(
            recipe.validation_fraction,
            recipe.test_fraction,
            lambda: (table["key"] for table in tables(folder, parts)),
        )
        return tally, limits

    def _existing(self) -> DataCard:
        """The card of the target if it holds this recipe's data of these sources."""
        target, recipe = self.space.target, self.recipe
        card = open_token_dataset(target).card
        remedy = "--force replaces it, or choose another --out"
        if card.recipe_sha256 != recipe.digest():
            what = f"holds data of recipe {card.recipe.name} with other settings"
            raise DataError(f"{target}: {what}; {remedy}")
        given = self._given
        if given is not None and given.fingerprint != card.tokenizer.sha256:
            path = recipe.tokenizer.path
            raise DataError(f"{target}: was encoded with another tokenizer than {path}; {remedy}")
        if not recipe.source.streaming and self._digest_now() != card.source.sha256:
            raise DataError(f"{target}: its sources have changed since; {remedy}")
        self.report.say(f"{target}: up to date, nothing to do ({card.summary()})")
        return card

    def _digest_now(self) -> str:
        """What `source_digest` would say of the sources as they are."""
        space = self.space
        try:
            space.open_parts(("compare", str(self.recipe.seed), self.corpus.stamp()))
            job = Job(self.corpus, self.recipe.seed, space.parts, encoder=None)
            parts = self._pass("compare with sources", job, space.finished(), self._crew())
            return source_digest(space.parts, parts)
        finally:
            space.drop_parts()
