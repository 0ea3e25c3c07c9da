"""`fgpt tokenizer train|encode|decode|inspect|report`. Errors are raised as DataError."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from fgpt.cli.arguments import ArgumentParser, nonempty
from fgpt.cli.corpus_flags import add_corpus_flags, recipe_from, set_flags
from fgpt.cli.run_flags import subcommands
from fgpt.data.recipe import check_recipe
from fgpt.errors import DataError, printable
from fgpt.prepare.learn_tokenizer import learn_tokenizer
from fgpt.prepare.progress import Reporter
from fgpt.prepare.sources.decode import MalformedDocument, check_utf8
from fgpt.prepare.sources.open_corpus import open_corpus
from fgpt.prepare.tokenizer_report import (
    TOTAL,
    IdCounts,
    SourceStats,
    compute_stats,
    count_ids,
)
from fgpt.tokenizer import hf_tokenizer, sentencepiece_model
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.load import load_tokenizer
from fgpt.tokenizer.probes import lossy_probes
from fgpt.tokenizer.spec import SpecialTokens
from fgpt.utils.files import check_writable

MAX_SOURCES_SHOWN = 10
BYTES_PER_ID = 64
"""Of a tokenizer's file, about."""
HEADER = (
    *("source", "tokenizer", "documents", "MB", "tokens", "bytes/token", "chars/token"),
    *("tokens/word", "used", "unknown", "in bytes", "coverage"),
)


_FILES = (hf_tokenizer.FILE_NAME, sentencepiece_model.FILE_NAME)
"""What `fgpt tokenizer train` writes; it touches no other file."""


def tokenizer_verb(argv: Sequence[str]) -> int:
    """fgpt tokenizer train|encode|decode|inspect|report. Returns the exit code."""
    parser = ArgumentParser(
        prog="fgpt tokenizer",
        description="Learn, try or compare tokenizers.",
        examples=["fgpt tokenizer train --input texts --out data/tokenizers/mine"],
    )
    add = subcommands(parser)

    train = add(
        "train",
        _train,
        "Learn a tokenizer from a corpus.",
        "fgpt tokenizer train --input texts --vocab_size 8192 --out data/tokenizers/mine",
    )
    add_corpus_flags(train)
    train.add_argument("--sample_mb", type=int, help="MB of text to learn from; default 200")
    train.add_argument(
        "--out", type=nonempty, required=True, help="directory for the tokenizer.json or .model"
    )
    train.add_argument("--force", action="store_true", help="replace another tokenizer in --out")
    encode = add(
        "encode",
        _encode,
        "Encode text (the argument, or stdin) to ids.",
        'fgpt tokenizer encode --tokenizer data/tokenizers/mine "def main("',
    )
    encode.add_argument("text", nargs="?", help="the text; default: all of stdin")
    decode_ = add(
        "decode",
        _decode,
        "Decode ids to text.",
        "fgpt tokenizer decode --tokenizer data/tokenizers/mine 71 72 73",
    )
    decode_.add_argument("ids", nargs="+", type=int, help="token ids")
    inspect = add(
        "inspect",
        _inspect,
        "Show properties, lossy probes and the longest tokens.",
        "fgpt tokenizer inspect --tokenizer data/prepared/mine",
    )
    for verb in (encode, decode_, inspect):
        _add_tokenizer_flags(verb, "store")
    report = add(
        "report",
        _report,
        "Compare tokenizers on a corpus, by source.",
        "fgpt tokenizer report --tokenizer data/tokenizers/mine --tokenizer gpt2/ --input texts",
    )
    add_corpus_flags(report)
    _add_tokenizer_flags(report, "append")
    report.add_argument("--sample_mb", type=int, default=1000, help="MB to read; default 1000")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.set_defaults(out=None)
    args = parser.parse_args(argv)
    if args.run is _report and set_flags(args, "vocab_size", "kind"):
        report.error("--vocab_size and --kind have no effect: no tokenizer is learned")
    args.run(args)
    return 0


def _add_tokenizer_flags(parser: argparse.ArgumentParser, action: str) -> None:
    files = "tokenizer.json, SentencePiece .model, or a directory with one or with GPT-2's files"
    repeat = "; repeat the flag to compare several" if action == "append" else ""
    parser.add_argument(
        "--tokenizer", type=nonempty, required=True, action=action, help=files + repeat
    )
    parser.add_argument(
        "--special_tokens",
        choices=get_args(SpecialTokens),
        default="text",
        help="encode the name of a special token in a text as text or as the token; default text",
    )
    parser.add_argument("--eod", type=nonempty, help="name of the token that ends a document")


def _load(args: argparse.Namespace, path: str) -> Tokenizer:
    return load_tokenizer(path, args.special_tokens, args.eod)


def _train(args: argparse.Namespace) -> None:
    recipe = check_recipe(recipe_from(args), "flags")
    spec = recipe.tokenizer
    if args.sample_mb is not None:
        spec = replace(spec, sample_mb=args.sample_mb)
    report = Reporter(True)
    out = Path(args.out)
    with _reported(out):
        check_writable(out, spec.vocab_size * BYTES_PER_ID)
    tokenizer = learn_tokenizer(spec, open_corpus(recipe.source, recipe.errors), report)
    with _reported(out):
        _save(tokenizer, out, report, force=args.force)


@contextmanager
def _reported(out: Path) -> Iterator[None]:
    """Raise DataError for an OSError of the output folder."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); name a folder that can"
        raise DataError(f"--out {out}: {reason}") from error


def _save(tokenizer: Tokenizer, out: Path, report: Reporter, *, force: bool) -> None:
    file = out / tokenizer.file_name
    present = [path for path in (out / name for name in _FILES) if path.is_file()]
    others = [path for path in present if path.read_bytes() != tokenizer.raw]
    if others and not force:
        raise DataError(f"{others[0]}: holds another tokenizer; --force replaces it")
    tokenizer.save(file)
    for other in others:
        report.print(f"{other}: another tokenizer, replaced")
        if other != file:  # the file of the other kind
            other.unlink()
    report.print(f"{file}: {tokenizer.vocab_size} ids, SHA-256 {tokenizer.fingerprint[:12]}...")


def _encode(args: argparse.Namespace) -> None:
    text = args.text
    if text is None:
        data = check_utf8(sys.stdin.buffer.read(), 0, "strict")
        if isinstance(data, MalformedDocument):
            raise DataError(str(data.within("stdin")))
        text = data.decode()
    print(*_load(args, args.tokenizer).encode(text))


def _decode(args: argparse.Namespace) -> None:
    print(_load(args, args.tokenizer).decode(args.ids))


def _inspect(args: argparse.Namespace) -> None:
    tokenizer = _load(args, args.tokenizer)
    tokens = [(tokenizer.id_to_token(i), i) for i in range(tokenizer.vocab_size)]
    longest = sorted(tokens, key=lambda pair: (-len(pair[0]), pair[1]))[:10]
    added = [*tokenizer.added_tokens[:10], *(["..."] if len(tokenizer.added_tokens) > 10 else [])]
    lines = {
        "kind": f"{tokenizer.kind} ({tokenizer.file_name})",
        "ids": tokenizer.vocab_size,
        "eod id": f"{tokenizer.eod_id} {tokenizer.eod}",
        "unknown": "none" if tokenizer.unk_id is None else f"id {tokenizer.unk_id}",
        "added": " ".join(added) or "none",
        "SHA-256": tokenizer.fingerprint,
        "loses": ", ".join(lossy_probes(tokenizer)) or "none of the probes",
        "longest": "  ".join(f"{i}:{text}" for text, i in longest),
    }
    for name, value in lines.items():
        print(f"{name:<12} {value}")


def _report(args: argparse.Namespace) -> None:
    recipe = check_recipe(recipe_from(args), "flags")
    if args.sample_mb < 1:
        raise DataError(f"--sample_mb is {args.sample_mb}; 1 or more is expected")
    tokenizers = [_load(args, path) for path in args.tokenizer]
    corpus = open_corpus(recipe.source, recipe.errors)
    texts, counts = count_ids(tokenizers, corpus, args.sample_mb, Reporter(not args.json))
    by_name = list(zip(args.tokenizer, counts, strict=True))
    rows = [row for name, count in by_name for row in compute_stats(name, texts, count)]
    if args.json:
        described = [{"tokenizer": name} | _describe(count) for name, count in by_name]
        print(
            json.dumps({"tokenizers": described, "rows": [asdict(row) for row in rows]}, indent=2)
        )
        return
    for name, count in by_name:
        print(
            f"{printable(name)}: {count.tokenizer.kind}, {count.tokenizer.vocab_size} ids;"
            f" {count.encoder}"
        )
    sources = [row.source for row in rows[: len(texts)]] if len(texts) > 1 else []
    shown = [*sources[:MAX_SOURCES_SHOWN], TOTAL]
    _print_table([row for source in shown for row in rows if row.source == source])
    if len(sources) > MAX_SOURCES_SHOWN:
        print(f"and {len(sources) - MAX_SOURCES_SHOWN} smaller sources (--json has them)")


def _describe(count: IdCounts) -> dict[str, object]:
    tokenizer = count.tokenizer
    return {
        "kind": tokenizer.kind,
        "ids": tokenizer.vocab_size,
        "sha256": tokenizer.fingerprint,
        "encoder": count.encoder,
        "loses": lossy_probes(tokenizer),
    }


def _print_table(rows: Sequence[SourceStats]) -> None:
    table = [HEADER, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[:2] = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        print("  ".join(cells))


def _cells(row: SourceStats) -> tuple[str, ...]:
    return (
        printable(row.source),
        printable(row.tokenizer),
        f"{row.documents}",
        f"{row.bytes / 1e6:.2f}",
        f"{row.tokens}",
        f"{row.bytes_per_token:.3f}",
        f"{row.characters_per_token:.3f}",
        f"{row.tokens_per_word:.2f}",
        f"{row.vocabulary_used:.1%}",
        f"{row.unknown}",
        f"{row.in_bytes:.3%}",
        f"{row.coverage:.3%}",
    )
