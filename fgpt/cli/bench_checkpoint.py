"""`fgpt bench checkpoint`: flags, and the table that it prints; starts the ranks, or is one."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fgpt.cli.arguments import ArgumentParser, file_path
from fgpt.cli.run_flags import counted
from fgpt.config.presets import PRESETS
from fgpt.config.resolve import Resolved, RunRequest, resolve
from fgpt.config.run_file import Override
from fgpt.errors import UserError
from fgpt.model.count import n_params

ROWS = ("mini", "gpt2")
FOLDER = "FGPT_BENCH_FOLDER"
"""Variable with the folder of the checkpoints, for the ranks."""
DEEPSPEED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
}
UNITS = {"bytes": 1e9, "deepspeed_bytes": 1e9}
"""Columns that are printed in GB."""
FACTOR = 4
"""Free space that is required, in checkpoints: two of FGPT's and DeepSpeed's larger ones."""


def bench_checkpoint_verb(argv: Sequence[str]) -> int:
    """Measure, print a table, append JSON lines. Raises FgptError."""
    args = _parser().parse_args(argv)
    from fgpt.distributed.launch import device_kind, world_from_environment

    kind = device_kind()
    os.environ.setdefault("DS_ACCELERATOR", kind)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
    if "RANK" not in os.environ:
        return _start_ranks(args, argv, kind)
    from fgpt.bench import record
    from fgpt.bench.checkpoint import measure_checkpoints, summary
    from fgpt.distributed.local_ranks import joined_ranks

    world = world_from_environment(os.environ)
    folder = Path(os.environ[FOLDER])
    console = Console(width=None if os.isatty(1) else 110, quiet=not world.is_rank0)
    with joined_ranks(world) as device:
        environment = record.environment(device)  # of the start: a record changes the work tree
        for row in args.rows:
            resolved = _resolved(row, args, world.size, kind)
            rounds = []
            for values in measure_checkpoints(resolved, world, device, folder, args.rounds):
                rounds.append(values)
                console.print(f"{row}: round {len(rounds)} of {args.rounds}", style="dim")
            facts = summary(rounds)
            about = {
                "row": row,
                "parameters": n_params(resolved.run.model),
                "precision": args.precision,
                "zero": args.zero,
                "ranks": world.size,
                "rounds": len(rounds),
            }
            console.print(_table(about, facts))
            if world.is_rank0:
                measured = {"measurement": "checkpoint", **about, "values": facts}
                record.append(args.out, {**environment, **measured})
    return 0


def _start_ranks(args: argparse.Namespace, argv: Sequence[str], kind: str) -> int:
    """Check flags and space once, then run this verb on the ranks."""
    from fgpt.bench.record import must_be_writable
    from fgpt.checkpoint.size import checkpoint_bytes
    from fgpt.distributed.local_ranks import run_local_ranks

    must_be_writable(args.out)
    runs = [_resolved(row, args, args.ranks, kind) for row in args.rows]
    place = args.dir or args.out.parent
    try:
        if args.dir is None:
            place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fgpt-bench-", dir=place) as folder:
            needed = FACTOR * max(map(checkpoint_bytes, runs))
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise UserError(
                    f"--dir {place}: {free / 2**30:.1f} GiB are free, {needed / 2**30:.1f} GiB are"
                    " needed: name a folder on another disk, or smaller --rows"
                )
            os.environ[FOLDER] = folder
            return run_local_ranks(["bench", "checkpoint", *argv], args.ranks)
    except OSError as error:
        raise UserError(f"--dir {place}: {error.strerror}: name a folder to write in") from error


def _resolved(row: str, args: argparse.Namespace, ranks: int, device: str) -> Resolved:
    ds = {**DEEPSPEED, "zero_optimization": {"stage": args.zero}}
    if args.precision == "bf16":
        ds["bf16"] = {"enabled": True}
    values = {"model.preset": row, "data.seq_len": 128, "train.steps": 10**6}
    overrides = tuple(Override(key, value, "fgpt bench") for key, value in values.items())
    request = RunRequest(Path("built-in.json"), overrides=overrides, deepspeed=ds)
    return resolve(request, world=ranks, device=device)


def _table(about: dict[str, Any], facts: dict[str, list[float]]) -> Table:
    title = "{row}, {precision} ZeRO-{zero}, {ranks} ranks"
    title = title.format(**about)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("measurement", "median", "lowest", "highest"):
        table.add_column(heading, justify="left" if heading == "measurement" else "right")
    for name, values in facts.items():
        scale = UNITS.get(name, 1.0)
        label = name.replace("bytes", "GB", 1) if name in UNITS else name
        table.add_row(label, *(f"{value / scale:.3f}" for value in values))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt bench checkpoint",
        description="Time and size of saving and loading, and what a background save takes from"
        " training, against DeepSpeed's own checkpoints of the same engine. copy, commit: what the"
        " loop waits for at both ends of a background save; stall: both; lost: the stall and what"
        " the steps meanwhile take longer; durable: with fsync, as FGPT's saves are.",
        examples=["fgpt bench checkpoint --rows mini --ranks 2 --rounds 3"],
    )
    add = parser.add_argument
    add("--rows", type=_rows, default=ROWS, metavar="PRESETS", help="default: mini,gpt2")
    add("--ranks", type=counted, default=2, metavar="N", help="on this machine (default: 2)")
    add("--rounds", type=counted, default=5, metavar="N", help="default: 5")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="default: bf16")
    add("--zero", type=int, choices=(1, 2, 3), default=2, help="ZeRO stage (default: 2)")
    add(
        "--dir",
        type=file_path,
        metavar="DIR",
        help="folder for the checkpoints, which are removed (default: that of --out)",
    )
    add(
        "--out",
        type=file_path,
        default=Path("runs/bench/checkpoint.jsonl"),
        metavar="FILE",
        help="records are appended here (default: runs/bench/checkpoint.jsonl)",
    )
    return parser


def _rows(text: str) -> tuple[str, ...]:
    rows = tuple(text.split(","))
    for row in rows:
        if row not in PRESETS:
            raise argparse.ArgumentTypeError(f"{row!r} is none of {', '.join(PRESETS)}")
    return rows
