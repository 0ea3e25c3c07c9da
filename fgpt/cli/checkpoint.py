"""`fgpt checkpoint VERB`: what checkpoints are, whether they are intact, differences, the mean."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fgpt.cli.arguments import ArgumentParser, file_path
from fgpt.cli.run_flags import counted, subcommands
from fgpt.errors import CheckpointError, UserError, printable

if TYPE_CHECKING:
    from fgpt.checkpoint.reader import CheckpointReader

LAYOUT = ("ranks", "tp", "pp", "cp", "ZeRO", "precision", "engine")
"""What a manifest says of the layout that saved it."""
SHOWN = 20
"""Tensors that `diff` prints."""


def checkpoint_verb(argv: Sequence[str]) -> int:
    """Run the verb: 0; 1 if two differ, 2 if one is damaged. Raises FgptError, OSError."""
    parser = ArgumentParser(
        prog="fgpt checkpoint",
        description="A run's checkpoints.",
        examples=["fgpt checkpoint inspect runs/tiny-zero2"],
    )
    add = subcommands(parser)
    paths = "run directories, or their checkpoints/step_NNNNNNNN, latest or best"
    inspect = add(
        "inspect",
        _inspect,
        "Step, tokens, validation loss, layout and size of checkpoints.",
        "fgpt checkpoint inspect runs/tiny-zero2 runs/tiny-bf16",
    )
    inspect.add_argument("paths", nargs="+", type=file_path, metavar="PATH", help=paths)
    inspect.add_argument("--json", action="store_true", help="print the manifests, one per line")
    verify = add(
        "verify",
        _verify,
        "Read checkpoints completely and compare their hashes.",
        "fgpt checkpoint verify runs/tiny-zero2/checkpoints/step_00000300",
    )
    verify.add_argument("paths", nargs="+", type=file_path, metavar="PATH", help=paths)
    one = "a checkpoint, or a run directory for its newest"
    diff = add(
        "diff",
        _diff,
        "Which tensors of two checkpoints differ, and by how much.",
        "fgpt checkpoint diff runs/tiny-zero2 runs/tiny-zero3 --all",
    )
    diff.add_argument("paths", nargs=2, type=file_path, metavar="PATH", help=one)
    diff.add_argument("--all", action="store_true", help=f"all tensors, not the first {SHOWN}")
    average = add(
        "average",
        _average,
        "The mean of the weights of checkpoints.",
        "fgpt checkpoint average runs/tiny-zero2 --last 2 --out runs/averaged",
    )
    average.add_argument("paths", nargs="+", type=file_path, metavar="PATH", help=one)
    average.add_argument("--last", type=counted, metavar="N", help="the last N of one run")
    average.add_argument(
        "--out", type=file_path, required=True, metavar="DIR", help="a new run directory"
    )
    upgrade = add(
        "upgrade",
        _upgrade,
        "Convert checkpoints of earlier FGPTs to the present format.",
        "fgpt checkpoint upgrade runs/old",
    )
    upgrade.add_argument("paths", nargs="+", type=file_path, metavar="PATH", help=paths)
    args = parser.parse_args(argv)
    return int(args.run(args))


def _checkpoints(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """(checkpoint, what the run directory says of it), a run's in the order of their steps.

    Raises CheckpointError for a path without one.
    """
    from fgpt.checkpoint.directory import locate

    for path in paths:
        directory, only = locate(path)
        newest, best = directory.newest(), directory.best()
        found = [c for c in directory.complete() if only is None or c.name == only.name]
        if not found:
            raise CheckpointError(
                f"{path}: no checkpoint there; name a run directory or one of its"
                " checkpoints/step_NNNNNNNN"
            )
        for checkpoint in reversed(found):
            marks = {"newest": newest, "best": best}
            yield checkpoint, ", ".join(m for m, which in marks.items() if which == checkpoint)


def _reader(path: Path) -> CheckpointReader:
    """The tensors of a checkpoint, or of a run's newest. Raises CheckpointError, OSError."""
    from fgpt.checkpoint.reader import open_intact

    *_, (checkpoint, _) = _checkpoints([path])
    return open_intact(checkpoint)


def _diff(args: argparse.Namespace) -> int:
    """0 if they are equal, 1 if not."""
    from fgpt.checkpoint.compare import differences

    first, second = map(_reader, args.paths)
    compared = list(differences(first, second))
    found = [difference for difference in compared if difference is not None]
    found.sort(key=lambda d: -(math.inf if d.relative is None else d.relative))
    progress = [reader.manifest.progress for reader in (first, second)]
    if not found and progress[0] == progress[1]:
        print(printable(f"{first.path} and {second.path}: equal, {len(compared)} tensors"))
        return 0
    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "state", "largest difference", "relative"):
        table.add_column(heading)
    for difference in found if args.all else found[:SHOWN]:
        numbers = (difference.what, "")
        if difference.largest is not None and difference.relative is not None:
            numbers = (f"{difference.largest:.3g}", f"{difference.relative:.3g}")
        cells = (difference.name, difference.state, *numbers)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    if found:
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    if len(found) > SHOWN and not args.all:
        print(f"... and {len(found) - SHOWN} more (--all)")
    print(f"{len(found)} of {len(compared)} tensors differ")
    names = {"updates": "updates that the optimizer states have seen"}
    for name in ("step", "skipped_steps", "updates", "loss_scale"):
        old, new = (getattr(each, name) for each in progress)
        if old != new:
            print(f"{names.get(name, name)}: {old} and {new}")
    return 1


def _average(args: argparse.Namespace) -> int:
    from fgpt.checkpoint.average import average
    from fgpt.checkpoint.directory import step_of
    from fgpt.tokenizer.load import COPY

    paths: list[Path] = args.paths
    if args.last:
        if len(paths) > 1:
            raise UserError("checkpoint average: --last takes one run directory")
        run, paths = paths[0], [path for path, _ in _checkpoints(paths)]
        if len(paths) < args.last:
            has = _counted(len(paths), "checkpoint")
            raise UserError(f"checkpoint average: --last {args.last}: {run} has {has}")
        paths = paths[-args.last :]
    readers = [_reader(path) for path in paths]
    if len(readers) < 2:
        raise UserError(
            "checkpoint average: one checkpoint has no mean: name several, or --last N of a run"
        )
    if os.path.lexists(args.out):
        raise UserError(f"--out {args.out}: exists already; name a new directory")
    _check_tokenizers(readers)
    try:
        written = average(readers, args.out / "checkpoints")
        tokenizer = readers[-1].path.absolute().parent.parent / COPY
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, args.out / COPY)
    except BaseException:
        shutil.rmtree(args.out, ignore_errors=True)
        raise
    print(printable(f"{written}: the mean of {len(readers)} checkpoints, weights only"))
    on = f"--resume {args.out} and --steps above {step_of(written)}"
    print(
        printable(f"train on with {on} beside the run's flags, or anew with --init_from {args.out}")
    )
    return 0


def _check_tokenizers(readers: Sequence[CheckpointReader]) -> None:
    """Raise UserError if two runs have tokenizers that differ; one without a copy may have any."""
    from fgpt.tokenizer.load import COPY, COPY_SETTINGS, load_copy

    folders = [reader.path.absolute().parent.parent / COPY for reader in readers]
    known = [folder for folder in folders if (folder / COPY_SETTINGS).exists()]
    prints = {folder: load_copy(folder).fingerprint for folder in dict.fromkeys(known)}
    for folder in known:
        if prints[folder] != prints[known[0]]:
            raise UserError(
                f"{known[0].parent} and {folder.parent} have different tokenizers: rows of their"
                " embeddings that mean other tokens have no mean"
            )


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _inspect(args: argparse.Namespace) -> int:
    from fgpt.checkpoint.manifest import read_manifest

    console = Console(width=None if sys.stdout.isatty() else 1000)  # a path is one word
    table = Table(box=None, pad_edge=False)
    for heading in ("checkpoint", "step", "tokens", "valid loss", "GiB", *LAYOUT, "optimizer", ""):
        table.add_column(heading, justify="right" if heading in ("step", "tokens") else "left")
    damaged = []
    origins = []
    for path, mark in _checkpoints(args.paths):
        try:
            manifest = read_manifest(path)
        except (CheckpointError, OSError) as error:
            damaged.append(str(error))
            continue
        if args.json:
            print(json.dumps({"path": str(path), **asdict(manifest)}))
            continue
        size = sum(file.size_bytes for file in manifest.files) / 2**30
        loss = "" if manifest.valid_loss is None else f"{manifest.valid_loss:.4f}"
        saved_by = manifest.history[-1].layout
        layout = ["" if saved_by.get(n) is None else str(saved_by[n]) for n in LAYOUT]
        numbers = (f"{manifest.step:,}", f"{manifest.tokens_seen:,}", loss, f"{size:.3f}")
        # a mean of checkpoints, or the state before the first step
        optimizer = manifest.optimizer if manifest.states else "weights only"
        cells = (str(path), *numbers, *layout, optimizer, mark)
        table.add_row(*(Text(printable(cell)) for cell in cells))
        if manifest.origin and manifest.origin not in origins:
            origins.append(manifest.origin)
    if table.row_count:
        console.print(table)
    for line in origins:
        print(printable(f"weights: {line}"))
    for line in damaged:
        print(f"fgpt: {printable(line)}", file=sys.stderr)
    return 2 if damaged else 0


def _verify(args: argparse.Namespace) -> int:
    from fgpt.checkpoint.reader import open_intact

    damaged = False
    for path, _ in _checkpoints(args.paths):
        try:
            files = open_intact(path).manifest.files
        except (CheckpointError, OSError) as error:
            print(f"fgpt: {printable(str(error))}", file=sys.stderr)
            damaged = True
            continue
        size = sum(file.size_bytes for file in files) / 2**30
        print(printable(f"{path}: intact; {_counted(len(files), 'file')}, {size:.3f} GiB"))
    return 2 if damaged else 0


def _upgrade(args: argparse.Namespace) -> int:
    from fgpt.checkpoint.upgrade import upgrade

    failed = False
    for path in args.paths:
        try:
            for outcome in upgrade(path):
                if isinstance(outcome, CheckpointError):
                    failed = True
                    print(f"fgpt: {outcome}", file=sys.stderr, flush=True)
                else:
                    print(printable(outcome), flush=True)
        except CheckpointError as error:  # the other paths may be convertible
            failed = True
            print(f"fgpt: {error}", file=sys.stderr, flush=True)
    return 2 if failed else 0
