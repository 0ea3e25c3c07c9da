"""`fgpt bench data`: flags, and the tables that it prints."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from fgpt.bench import record
from fgpt.bench.data.draw import DrawResult, measure_draws, measure_opening, write_synthetic_shard
from fgpt.bench.data.encode import EncodeBench, EncodeResult, measure_encoding
from fgpt.bench.machine import product_tflops
from fgpt.cli.arguments import ArgumentParser, file_path, nonempty
from fgpt.cli.run_flags import counted
from fgpt.data.recipe import SourceSpec
from fgpt.tokenizer.spec import Kind

MEAN_DOCUMENT = 1000
"""Mean length of a document of the large data set, in tokens."""
WIDTH = 134
"""Width of the tables without a terminal, in characters."""


def bench_data_verb(argv: Sequence[str]) -> int:
    """Measure, print tables, append JSON lines. Raises FgptError."""
    args = _parser().parse_args(argv)
    record.must_be_writable(args.out)
    cpu = torch.device("cpu")
    environment = {**record.environment(cpu), "product_tflops": product_tflops(cpu)}
    console = Console(width=None if os.isatty(1) else WIDTH)

    def log(line: str) -> None:
        console.print(line, style="dim", highlight=False)

    def save(kind: str, facts: dict[str, Any]) -> None:
        record.append(args.out, {**environment, "measurement": kind, **facts})

    with tempfile.TemporaryDirectory(dir=args.tmp) as name:
        folder = Path(name)
        if args.input:
            source = SourceSpec("local", args.input, document_separator=args.document_separator)
        else:
            source = SourceSpec("local", sysconfig.get_path("purelib"))
        sizes = args.vocab_size, args.learn_mb, args.rounds, args.workers
        bench = EncodeBench(source, *sizes, folder, mismatch_folder=args.out.parent)
        results = []
        for kind in get_args(Kind) if args.kinds is None else args.kinds:
            results.append(measure_encoding(bench, kind, log))
            save("encode", asdict(results[-1]))
        if results:
            console.print(_encode_table(results))
            for result in results:
                log(f"{result.kind}: {result.encoder}")
        if args.tokens:
            _measure_large(args, folder / "large", console, log, save)
    log(f"records: {args.out}")
    return 0


def _measure_large(
    args: argparse.Namespace, prefix: Path, console: Console, log: Any, save: Any
) -> None:
    """Open the large data set, then draw samples from it."""
    n_documents = write_synthetic_shard(prefix, args.tokens, MEAN_DOCUMENT)
    sizes = {"tokens": args.tokens, "documents": n_documents}
    cost = measure_opening(prefix, args.seq_len)
    save("open", sizes | cost)
    console.print(
        f"opening {args.tokens:.3g} tokens in {n_documents:,} documents: {cost['open_s']:.2f} s,"
        f" all checks of the index included; {cost['first_batch_s'] * 1e3:.1f} ms to the first 32"
        f" samples; {cost['grown_mb']:.0f} MB of memory besides the mapped files",
        highlight=False,
    )
    log(f"drawing {args.samples:,} samples")
    draws = measure_draws(prefix, args.seq_len, args.samples, args.rounds)
    for draw in draws:
        save("draw", sizes | asdict(draw))
    console.print(_draw_table(draws))


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt bench data",
        description="Compare `fgpt prepare` with the tokenizer's library alone, from raw text to"
        " finished shards with equal ids; measure opening and sampling of a large data set.",
        examples=["fgpt bench data --input texts --kinds bpe --tokens 0"],
    )
    add = parser.add_argument
    add(
        "--input",
        type=nonempty,
        help="file or folder of text; default: the installed Python packages",
    )
    add("--document_separator", help="text between two documents of a text file")
    add("--kinds", nargs="*", action="extend", choices=get_args(Kind), help="default: all")
    add("--vocab_size", type=counted, default=32_768, help="vocabulary to learn (32768)")
    add("--learn_mb", type=_positive, default=30.0, help="text to learn from, in MB (30)")
    add("--workers", type=counted, default=len(os.sched_getaffinity(0)), help="default: all cores")
    add("--rounds", type=counted, default=2, help="rounds of each variant (2)")
    add(
        "--tokens",
        type=_count,
        default=10**10,
        help="of the large data set (10^10); 0: none",
    )
    add("--seq_len", type=counted, default=1024, help="tokens per sample (1024)")
    add("--samples", type=counted, default=10**6, help="samples per round (10^6)")
    add("--tmp", type=_directory, help="working directory; default: the system's temporary folder")
    add("--out", type=file_path, default=Path("runs/bench/data.jsonl"), metavar="FILE")
    return parser


def _positive(text: str) -> float:
    number = float(text)  # argparse reports a ValueError
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 on")
    return int(text)


def _directory(text: str) -> Path:
    path = file_path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path


def _encode_table(results: Sequence[EncodeResult]) -> Table:
    first = results[0]
    size = (
        f"{first.text_mb:.1f} MB in {first.documents:,} documents, {first.workers} processes,"
        f" {first.vocab_size:,} ids"
    )
    table = Table(
        "tokenizer", "library MB/s", "fastest", "fgpt MB/s", "times (low..high)", "times fastest",
        "outside encoder: tasks, all", "peak MB",
        title=f"raw text to finished shards, equal bytes: {size}",
    )  # fmt: skip
    for result in results:
        fastest_s = result.fastest_s or result.plain_s
        ratios = [
            "{:.1f} ({:.1f}..{:.1f})".format(*result.ratios(s)) for s in (result.plain_s, fastest_s)
        ]
        outside = [
            f"{1 - statistics.mean(shares):.0%}"
            for shares in (result.in_encoder, result.in_encoder_of_all)
        ]
        table.add_row(
            result.kind,
            f"{result.mb_per_s(result.plain_s):.1f}",
            f"{result.mb_per_s(fastest_s):.1f}",
            f"{result.mb_per_s(result.pipeline_s):.1f}",
            *ratios,
            ", ".join(outside),
            f"{result.peak_rss_mb:.0f}",
        )
    return table


def _draw_table(results: Sequence[DrawResult]) -> Table:
    table = Table("samples", "order", "tokens read", "samples/s", "seconds (each round)")
    for result in results:
        seconds = ", ".join(f"{s:.2f}" for s in result.seconds)
        reads = "yes" if result.reads else "no, places only"
        table.add_row(result.way, result.order, reads, f"{result.per_s:,.0f}", seconds)
    return table
