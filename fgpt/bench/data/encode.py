"""Raw text to finished shards: the pipeline against its slow twin, in one run, ids compared."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fgpt.bench.data.baseline import held_out, prepare_plainly, ways
from fgpt.bench.data.diff import first_difference
from fgpt.bench.data.memory import peak_rss_bytes
from fgpt.data.recipe import Recipe, SourceSpec
from fgpt.errors import DataError
from fgpt.prepare.parts import Timing
from fgpt.prepare.pipeline import prepare
from fgpt.prepare.sources.corpus import Corpus, Tally, documents
from fgpt.prepare.sources.open_source import open_corpus
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.spec import Kind, TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer

FRACTION, SEED = 0.01, 1234


@dataclass
class EncodeResult:
    """One tokenizer, both ways."""

    kind: str
    """Kind of tokenizer."""
    vocab_size: int
    """Its ids."""
    text_mb: float
    """Text, in MB (10^6 bytes)."""
    documents: int
    """Documents."""
    tokens: int
    """Tokens of all splits, the same both ways."""
    workers: int
    """Processes of the pipeline; threads of the library."""
    encoder: str = ""
    """What the pipeline chose, and why."""
    pipeline_s: list[float] = field(default_factory=list)
    """Seconds of each round, from raw text to finished shards."""
    plain_s: list[float] = field(default_factory=list)
    """The same for the slow twin, the library called as everybody does."""
    fastest_s: list[float] = field(default_factory=list)
    """The same, called in a faster way; none: there is no faster way."""
    in_encoder: list[float] = field(default_factory=list)
    """Share of the time that workers had a task inside the encoder, each round (no unit)."""
    in_encoder_of_all: list[float] = field(default_factory=list)
    """Share of workers x whole time, with starting, choosing and merging, inside the encoder."""
    peak_rss_mb: float = 0.0
    """Largest resident memory of the pipeline's processes together, shared pages in each."""

    def mb_per_s(self, seconds: list[float]) -> float:
        """Median speed in MB/s."""
        return self.text_mb / statistics.median(seconds)

    def ratios(self, others_s: list[float]) -> tuple[float, float, float]:
        """(median, lowest, highest) of others_s / pipeline_s, round by round."""
        found = [a / b for a, b in zip(others_s, self.pipeline_s, strict=True)]
        return statistics.median(found), min(found), max(found)


@dataclass(frozen=True)
class Trial:
    """What every kind of tokenizer is measured on."""

    source: SourceSpec
    """The text."""
    vocab_size: int
    """Ids to learn."""
    learn_mb: float
    """Text to learn them from, in MB."""
    rounds: int
    """Rounds of each way."""
    workers: int
    """Processes of the pipeline; threads of the library."""
    folder: Path
    """Where to work."""
    evidence: Path
    """Where to keep what shows that ids differ."""


def compare(trial: Trial, kind: Kind, say: Callable[[str], None]) -> EncodeResult:
    """Learn a tokenizer (not timed), then prepare the corpus every way, in turns.

    Raises DataError if they do not write the same bytes.
    """
    source, workers, folder = trial.source, trial.workers, trial.folder
    tokenizer = _learned(trial, kind)
    spec = TokenizerSpec(path=str(folder / kind))
    recipe = Recipe("bench", source, spec, FRACTION, seed=SEED, errors="skip")
    corpus = open_corpus(source, recipe.errors)
    # not timed: the twin reads once; and now all of the text is in memory, no way waits for a disk
    is_valid = held_out(corpus, FRACTION, SEED)
    result: EncodeResult | None = None
    for number in range(trial.rounds):
        say(f"{kind}: round {number + 1} of {trial.rounds}")
        fast = folder / f"{kind}-{number}-fast"
        timing = Timing()
        t0 = time.perf_counter()
        card = prepare(recipe, fast, progress=False, workers=workers, timing=timing)
        t1 = time.perf_counter()
        seconds: dict[str, float] = {}
        for way in ways(tokenizer):
            slow = folder / f"{kind}-{number}-{way}"
            t2 = time.perf_counter()
            plain = prepare_plainly(corpus, tokenizer, workers, way, is_valid, slow)
            seconds[way] = time.perf_counter() - t2
            if (card.train, card.valid) != (plain["train"], plain["valid"]):
                what = _what_differs(corpus, is_valid, (fast, slow), tokenizer, trial.evidence)
                raise DataError(f"{fast.name} and {slow.name} differ: {what}")
        if result is None:
            size = card.source.bytes / 1e6
            n_documents, vocabulary = card.source.documents, tokenizer.vocab_size
            result = EncodeResult(kind, vocabulary, size, n_documents, card.tokens, workers)
        result.encoder = timing.encoder
        result.pipeline_s.append(t1 - t0)
        result.plain_s.append(seconds["lists"])
        if "arrays" in seconds:
            result.fastest_s.append(seconds["arrays"])
        result.in_encoder.append(timing.encode_s / timing.busy_s)
        result.in_encoder_of_all.append(timing.encode_s / (workers * (t1 - t0)))
    assert result is not None
    result.peak_rss_mb = _peak_mb(recipe, workers, folder / f"{kind}-peak")
    return result


def _what_differs(
    corpus: Corpus,
    is_valid: list[int],
    pair: tuple[Path, Path],
    tokenizer: Tokenizer,
    evidence: Path,
) -> str:
    if corpus.has_changed():
        return f"{corpus.label} changed meanwhile; run again"
    found = first_difference(corpus, is_valid, *pair)
    if found is None:
        return f"the ids are the same; were there other documents in {corpus.label} for a while?"
    where = f"the first is document {found.number} ({found.source}), token {found.token}"
    return f"ids are not the same; {where}; kept in {found.keep(tokenizer, evidence)}"


def _learned(trial: Trial, kind: Kind) -> Tokenizer:
    """A tokenizer of the text's beginning, kept in FOLDER/KIND."""

    def texts() -> Iterator[str]:
        size = 0
        for document in documents(open_corpus(trial.source, "skip"), Tally()):
            yield document.text
            size += len(document.data)
            if size > trial.learn_mb * 1e6:
                return

    tokenizer = train_tokenizer(TokenizerSpec(vocab_size=trial.vocab_size, kind=kind), texts())
    (trial.folder / kind).mkdir()
    tokenizer.save(trial.folder / kind)
    return tokenizer


def _peak_mb(recipe: Recipe, workers: int, out: Path) -> float:
    """Peak of a preparation in processes of its own."""
    code = (
        "import sys; sys.path[:] = filter(None, sys.path);"
        "from fgpt.prepare.pipeline import prepare;"
        "from fgpt.data.recipe import load_recipe;"
        "prepare(load_recipe(sys.argv[1]), sys.argv[2], progress=False, workers=int(sys.argv[3]))"
    )
    file = out.with_suffix(".json")
    file.write_text(json.dumps(asdict(recipe)))
    command = [sys.executable, "-c", code, str(file), str(out), str(workers)]
    return peak_rss_bytes(subprocess.Popen(command)) / 1e6
