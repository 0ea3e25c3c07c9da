"""`fgpt doctor`: examine the machines before a run; starts the ranks, or is one."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fgpt.cli.arguments import ArgumentParser
from fgpt.cli.run_flags import add_run_flags, counted, request_of
from fgpt.errors import ConfigError, UserError

if TYPE_CHECKING:
    from fgpt.doctor.check import Check
    from fgpt.doctor.examine import Subject

RANKS = 2
"""Ranks on a CPU without --ranks."""
DEFAULT_PORT = "29500"
"""Of torchrun, deepspeed and accelerate."""


def doctor_verb(argv: Sequence[str]) -> int:
    """Examine and print the page; returns 1 if a check is an error. Raises FgptError."""
    if "--gpu" in argv:
        from fgpt.cli.gpu_check import gpu_check_verb

        return gpu_check_verb(argv)
    arguments = _parser().parse_args(argv)
    from fgpt.distributed.launch import device_kind, world_from_environment

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
    kind = device_kind()
    world = world_from_environment(os.environ)
    if "RANK" not in os.environ and world.size == 1:
        from fgpt.distributed.local_ranks import gpu_count_or, run_local_ranks
        from fgpt.doctor.examine import data_identity

        n = arguments.ranks or gpu_count_or(RANKS)
        data_identity(_subject(arguments, n, kind).data)  # reports wrong input once
        port = os.environ.get("MASTER_PORT", DEFAULT_PORT)
        if not (port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(f"MASTER_PORT={port} is not a port: a number from 1 to 65535")
        return run_local_ranks(["doctor", *argv, "--port", port], n)
    if arguments.ranks not in (None, world.size):
        raise UserError(
            f"--ranks {arguments.ranks}: the launcher started {world.size}; leave the flag out"
        )
    from fgpt.distributed.agreements import gather_json
    from fgpt.distributed.local_ranks import joined_ranks
    from fgpt.doctor.check import worst
    from fgpt.doctor.examine import examine

    subject = _subject(arguments, world.size, kind)
    with joined_ranks(world) as device:
        checks = examine(world, device, subject)
        failure = None
        try:
            if world.is_rank0:
                _print(checks, world.size, arguments.json)
        except OSError as error:  # a full disk, a closed pipe
            failure = error
        gather_json(None, device)  # the first rank that ends with 1 ends the others
    if failure is not None:
        raise failure
    return int(worst(checks) == "error")


def _print(checks: Sequence[Check], n_ranks: int, is_json: bool) -> None:
    from rich.console import Console

    from fgpt.doctor.page import as_json, render

    if is_json:
        print(json.dumps(as_json(checks, n_ranks), indent=1))
    else:
        render(checks, n_ranks, Console())
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt doctor",
        description="Examine machines and network before a run: versions, devices and their speed,"
        " limits, disk, clocks, and each process group of the layout. Every line is ok, slow,"
        " warning or error; 1 is the exit code with an error.",
        examples=(
            "fgpt doctor --ranks 2",
            "fgpt doctor --gpu",
            "fgpt doctor --ds_config ds_configs/zero1.json --tp 2 --ranks 4",
            "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500"
            " -m fgpt.cli doctor --tp 8 --run_dir /shared/run",
        ),
    )
    add_run_flags(parser, ds_config_required=False)
    # every flag of launchers/train.py is accepted
    for flag in ("--resume", "--allow"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    group = parser.add_argument_group("the examination")
    group.add_argument(
        "--ranks",
        type=counted,
        metavar="N",
        help=f"ranks to start on this machine (default: GPUs, or {RANKS}); a launcher starts its"
        " own",
    )
    group.add_argument(
        "--gpu",
        action="store_true",
        help="instead: check everything that runs on a GPU (its --help)",
    )
    group.add_argument("--json", action="store_true", help="print JSON instead of the page")
    # a rank that this verb started: the port of the user's own runs
    parser.add_argument("--port", type=counted, help=argparse.SUPPRESS)
    return parser


def _subject(arguments: argparse.Namespace, n: int, kind: str) -> Subject:
    """What is examined with n ranks on a device of this kind. Raises ConfigError, UserError."""
    from fgpt.config.field_syntax import blend_error
    from fgpt.config.resolve import resolve
    from fgpt.config.run_file import load
    from fgpt.doctor.examine import Subject
    from fgpt.parallel.topology import Grid

    request, port = request_of(arguments), arguments.port
    if request.ds_config is not None:
        resolved = resolve(request, world=n, device=kind)
        run = resolved.run
        grid = Grid.of(resolved.batch)
        return Subject(grid, Path(str(run.run_dir)), run.data.path, resolved, port)
    loaded = load(request.run_file, request.overrides)
    if any(issue.grade == "error" for issue in loaded.issues):
        raise ConfigError(loaded.issues)
    run = loaded.run
    if problem := blend_error(run.data.path):
        raise UserError(f"data.path: {problem}: write DIR, or DIR:0.7,DIR:0.3")
    sizes = {"pp": run.parallel.pp, "cp": run.parallel.cp, "tp": run.parallel.tp}
    per_replica = sizes["pp"] * sizes["cp"] * sizes["tp"]
    if n % per_replica:
        named = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        raise UserError(f"{n} ranks are not a multiple of {named}: change --ranks or the layout")
    grid = Grid(dp=n // per_replica, **sizes)
    return Subject(grid, Path(run.run_dir or "runs"), run.data.path, None, port)
