"""`fgpt checkpoint inspect | verify | upgrade`: what a run's checkpoints are, whether they are
intact, and their conversion from the format of earlier FGPTs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fgpt.cli.arguments import ArgumentParser, file_path
from fgpt.cli.run_flags import subcommands
from fgpt.errors import CheckpointError, printable

LAYOUT = ("ranks", "tp", "pp", "cp", "ZeRO", "precision", "engine")
"""What a manifest says of the layout that saved it."""


def checkpoint_verb(argv: Sequence[str]) -> int:
    """Run the verb; 0, or 2 if a checkpoint is damaged. Raises CheckpointError, OSError."""
    parser = ArgumentParser(prog="fgpt checkpoint", description="A run's checkpoints.")
    add = subcommands(parser)
    paths = "run directories, or their checkpoints/step_NNNNNNNN"
    inspect = add("inspect", _inspect, "Step, tokens, losses, layout and size of checkpoints.")
    inspect.add_argument("paths", nargs="+", type=file_path, metavar="PATH", help=paths)
    inspect.add_argument("--json", action="store_true", help="print the manifests, one per line")
    verify = add("verify", _verify, "Read checkpoints completely and compare their hashes.")
    verify.add_argument("paths", nargs="+", type=file_path, metavar="PATH", help=paths)
    upgrade = add(
        "upgrade", _upgrade, "Convert checkpoints of earlier FGPTs to the present format."
    )
    upgrade.add_argument("paths", nargs="+", type=file_path, metavar="PATH", help=paths)
    args = parser.parse_args(argv)
    return int(args.run(args))


def _checkpoints(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """(checkpoint, what the run directory says of it), a run's in the order of their steps.

    Raises CheckpointError for a path without one.
    """
    import torch

    from fgpt.checkpoint.manager import NAME, Checkpoints
    from fgpt.config.schema import CheckpointConfig
    from fgpt.distributed.launch import World

    for path in paths:
        path = _with_name(path)
        is_checkpoint = NAME.fullmatch(path.name) is not None
        root = path.parent if is_checkpoint else path / "checkpoints"
        all_of_run = Checkpoints(root, World(), torch.device("cpu"), CheckpointConfig())
        newest, best = all_of_run.newest(), all_of_run.best()
        found = [c for c in all_of_run.complete() if not is_checkpoint or c.name == path.name]
        if not found:
            raise CheckpointError(
                f"{path}: no checkpoint there; name a run directory or one of its"
                " checkpoints/step_NNNNNNNN"
            )
        for checkpoint in reversed(found):
            marks = {"newest": newest, "best": best}
            yield checkpoint, ", ".join(m for m, which in marks.items() if which == checkpoint)


def _with_name(path: Path) -> Path:
    """The path; "." has no name."""
    return Path(os.path.abspath(path)) if path == Path(".") else path


def _inspect(args: argparse.Namespace) -> int:
    from fgpt.checkpoint.manifest import read_manifest

    console = Console(width=None if sys.stdout.isatty() else 1000)  # a path is one word
    table = Table(box=None, pad_edge=False)
    for heading in ("checkpoint", "step", "tokens", "valid loss", "GiB", *LAYOUT, "optimizer", ""):
        table.add_column(heading, justify="right" if heading in ("step", "tokens") else "left")
    damaged = []
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
        cells = (str(path), *numbers, *layout, manifest.optimizer, mark)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    if table.row_count:
        console.print(table)
    for line in damaged:
        print(f"fgpt: {printable(line)}", file=sys.stderr)
    return 2 if damaged else 0


def _verify(args: argparse.Namespace) -> int:
    from fgpt.checkpoint.manifest import check_file, check_names, read_manifest
    from fgpt.checkpoint.reader import CheckpointReader

    damaged = False
    for path, _ in _checkpoints(args.paths):
        try:
            manifest = read_manifest(path)
            check_names(path, manifest.files)
            for file in manifest.files:
                check_file(path, file)
            CheckpointReader(path, manifest)  # every tensor is complete
        except (CheckpointError, OSError) as error:
            print(f"fgpt: {printable(str(error))}", file=sys.stderr)
            damaged = True
            continue
        size = sum(file.size_bytes for file in manifest.files) / 2**30
        print(printable(f"{path}: intact; {len(manifest.files)} files, {size:.3f} GiB"))
    return 2 if damaged else 0


def _upgrade(args: argparse.Namespace) -> int:
    from fgpt.checkpoint.upgrade import upgrade

    failed = False
    for path in map(_with_name, args.paths):
        for outcome in upgrade(path):
            is_error = isinstance(outcome, CheckpointError)
            failed = failed or is_error
            text = f"fgpt: {outcome}" if is_error else printable(str(outcome))
            print(text, file=sys.stderr if is_error else sys.stdout, flush=True)
    return 2 if failed else 0
