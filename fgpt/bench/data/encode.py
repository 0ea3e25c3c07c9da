"""Raw text to finished shards: the pipeline against its baseline in one run, ids compared."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from fgpt.bench.data.baseline import (
    explain_mismatch,
    held_out,
    output_types,
    prepare_baseline,
)
from fgpt.data.recipe import Recipe, SourceSpec
from fgpt.errors import DataError, UserError
from fgpt.prepare.parts import Timing
from fgpt.prepare.pipeline import prepare
from fgpt.prepare.sources.corpus import ReadStats, read_documents
from fgpt.prepare.sources.open_corpus import open_corpus
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.spec import Kind, TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
from fgpt.utils.process import tree_resident_bytes

VALID_FRACTION, SEED = 0.01, 1234
POLL_S = 0.01
"""Interval between two readings of the memory, in seconds."""


@dataclass
class EncodeResult:
    """Measurements of one tokenizer. The field names are keys of the JSON records."""

    kind: str
    """Kind of tokenizer."""
    vocab_size: int
    text_mb: float
    """Text, in MB (10^6 bytes)."""
    documents: int
    tokens: int
    """Tokens of all splits."""
    workers: int
    """Processes of the pipeline; threads of the library."""
    encoder: str = ""
    """The encoder that the pipeline chose, and why."""
    pipeline_s: list[float] = field(default_factory=list)
    """Seconds of each round, from raw text to finished shards."""
    plain_s: list[float] = field(default_factory=list)
    """The same for the baseline, with lists of ids."""
    fastest_s: list[float] = field(default_factory=list)
    """The same with arrays of ids; empty if the library has none."""
    in_encoder: list[float] = field(default_factory=list)
    """Fraction of the workers' busy time inside the encoder, each round."""
    in_encoder_of_all: list[float] = field(default_factory=list)
    """The same of workers x total time, with starting, choosing the encoder and merging."""
    peak_rss_mb: float = 0.0
    """Peak RSS summed over the pipeline's processes (shared pages count in each), in MB."""

    def mb_per_s(self, seconds: list[float]) -> float:
        """Median speed in MB/s."""
        return self.text_mb / statistics.median(seconds)

    def ratios(self, baseline_s: list[float]) -> tuple[float, float, float]:
        """Median, lowest and highest of baseline_s / pipeline_s, round by round."""
        ratios = [a / b for a, b in zip(baseline_s, self.pipeline_s, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


@dataclass(frozen=True)
class EncodeBench:
    """What every kind of tokenizer is measured on."""

    source: SourceSpec
    vocab_size: int
    """Vocabulary to learn."""
    learn_mb: float
    """Text to learn it from, in MB."""
    rounds: int
    workers: int
    """Processes of the pipeline; threads of the library."""
    folder: Path
    """Working directory."""
    mismatch_folder: Path
    """Where a document with differing ids is saved."""


def measure_encoding(bench: EncodeBench, kind: Kind, log: Callable[[str], None]) -> EncodeResult:
    """Learn a tokenizer, then prepare the corpus by the pipeline and the baseline, in turns.

    Raises DataError if they do not write the same bytes.
    """
    source, workers, folder = bench.source, bench.workers, bench.folder
    # 1. outside the clock: learn the tokenizer, read all text into the page cache
    tokenizer = _learn_tokenizer(bench, kind)
    spec = TokenizerSpec(path=str(folder / kind))
    recipe = Recipe("bench", source, spec, VALID_FRACTION, seed=SEED, errors="skip")
    corpus = open_corpus(source, recipe.errors)
    is_valid = held_out(corpus, tokenizer, VALID_FRACTION, SEED)
    result: EncodeResult | None = None
    for number in range(bench.rounds):
        log(f"{kind}: round {number + 1} of {bench.rounds}")
        # 2. the pipeline
        pipeline_out = folder / f"{kind}-{number}-fast"
        timing = Timing()
        t0 = time.perf_counter()
        card = prepare(recipe, pipeline_out, progress=False, workers=workers, timing=timing)
        pipeline_s = time.perf_counter() - t0
        # 3. the baseline, which must write the same bytes
        seconds: dict[str, float] = {}
        for output_type in output_types(tokenizer):
            out = folder / f"{kind}-{number}-{output_type}"
            t0 = time.perf_counter()
            shards = prepare_baseline(corpus, tokenizer, workers, output_type, is_valid, out)
            seconds[output_type] = time.perf_counter() - t0
            if (card.train, card.valid) != (shards["train"], shards["valid"]):
                pair = pipeline_out, out
                cause = explain_mismatch(corpus, tokenizer, is_valid, pair, bench.mismatch_folder)
                raise DataError(f"{pipeline_out.name} and {out.name} differ: {cause}")
        if result is None:
            size_mb, n_documents = card.source.bytes / 1e6, card.source.documents
            vocab_size = tokenizer.vocab_size
            result = EncodeResult(kind, vocab_size, size_mb, n_documents, card.tokens, workers)
        result.encoder = timing.encoder
        result.pipeline_s.append(pipeline_s)
        result.plain_s.append(seconds["lists"])
        if "arrays" in seconds:
            result.fastest_s.append(seconds["arrays"])
        result.in_encoder.append(timing.encode_s / timing.busy_s)
        result.in_encoder_of_all.append(timing.encode_s / (workers * pipeline_s))
    assert result is not None
    result.peak_rss_mb = _peak_mb(recipe, workers, folder / f"{kind}-peak")
    return result


def _learn_tokenizer(bench: EncodeBench, kind: Kind) -> Tokenizer:
    """Train a tokenizer on the beginning of the text; save it to FOLDER/KIND."""

    def texts() -> Iterator[str]:
        size = 0
        for document in read_documents(open_corpus(bench.source, "skip"), ReadStats()):
            yield document.text
            size += len(document.data)
            if size > bench.learn_mb * 1e6:
                return

    tokenizer = train_tokenizer(TokenizerSpec(vocab_size=bench.vocab_size, kind=kind), texts())
    (bench.folder / kind).mkdir()
    tokenizer.save(bench.folder / kind)
    return tokenizer


def _peak_mb(recipe: Recipe, workers: int, out: Path) -> float:
    """Peak RSS of the pipeline in a fresh process."""
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


def peak_rss_bytes(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; return the peak RSS summed over it and its children, in bytes.

    Raises UserError if it fails.
    """
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        peak = max(peak, tree_resident_bytes(watched))
        time.sleep(POLL_S)
    if process.returncode:
        raise UserError(f"the measured process failed with exit code {process.returncode}")
    return peak
