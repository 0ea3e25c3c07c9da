"""`fgpt resume-check`: check that a run resumes exactly; starts the ranks, or is one."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fgpt.cli.arguments import ArgumentParser, file_path, nonempty
from fgpt.cli.run_flags import add_run_flags, counted, request_of, separate_steps
from fgpt.cli.working_folder import working_folder
from fgpt.errors import LaunchError, UserError

if TYPE_CHECKING:
    from fgpt.distributed.launch import World
    from fgpt.parity.resume_layouts import ResumeCheck

STEPS = 6
RANKS = 2
"""Ranks on a CPU without --world."""


def resume_check_verb(argv: Sequence[str]) -> int:
    """Train, resume, compare, print; 1 if a layout resumes another run. Raises FgptError."""
    arguments = _parser().parse_args(argv)
    from fgpt.distributed.launch import device_kind, world_from_environment

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
    os.environ.setdefault("DS_ACCELERATOR", device_kind())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic kernels
    check = _resume_check(arguments, device_kind())
    world = world_from_environment(os.environ)
    if arguments.train is not None:
        return _train(check, arguments, world)
    if "RANK" in os.environ or world.size > 1:
        raise LaunchError("fgpt resume-check starts its own ranks: call it without a launcher")
    _check_data(check)
    with working_folder(arguments.keep, "resume-check") as folder:
        return _compare(check, arguments, argv, folder)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt resume-check",
        description="Train a few steps of your run, train some of them, stop, and resume at the"
        " same and at other layouts; then compare losses, samples, learning rates, gradient norms,"
        " weights and optimizer states with the uninterrupted run.",
        examples=["fgpt resume-check --ds_config ds_configs/zero2.json --layouts tp2,zero3"],
    )
    add_run_flags(parser)
    # every flag of launchers/train.py is accepted; where a run continues is chosen here
    for flag in ("--resume", "--allow"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    add = parser.add_argument_group("the check").add_argument
    add(
        "--world",
        type=counted,
        metavar="N",
        help=f"ranks of your run (default: GPUs, or {RANKS})",
    )
    add("--at", type=counted, metavar="K", help="the step to stop after (default: half of --steps)")
    add(
        "--layouts",
        type=nonempty,
        metavar="NAMES",
        help="besides the same layout: as in zero1,tp2,pp2,cp2,tp2zero3,half,double,plain; same:"
        " no other; all (default: half or double the ranks, another ZeRO stage, tp2, pp2)",
    )
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--keep", type=file_path, metavar="DIR", help="keep the run directories here")
    # a rank: which runs it trains, and where
    parser.add_argument("--train", type=nonempty, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=file_path, help=argparse.SUPPRESS)
    return parser


def _resume_check(arguments: argparse.Namespace, device: str) -> ResumeCheck:
    """Return what is trained. Raises ConfigError, UserError."""
    import torch

    from fgpt.parity.resume_layouts import MAX_RANKS, make_resume_check, names_of

    request, steps = separate_steps(request_of(arguments), STEPS)
    n_gpus = torch.cuda.device_count()
    world = arguments.world or n_gpus or RANKS
    if device == "cuda" and world > n_gpus:
        raise UserError(f"--world {world}: this machine has {n_gpus} GPU{'s' * (n_gpus > 1)}")
    return make_resume_check(
        request,
        world=world,
        device=device,
        max_ranks=n_gpus or max(MAX_RANKS, world),
        steps=steps,
        at=arguments.at or max(1, steps // 2),
        names=None if arguments.layouts is None else names_of(arguments.layouts),
    )


def _check_data(check: ResumeCheck) -> None:
    """Raise DataError unless the data sets exist and are large enough; changes nothing."""
    from fgpt.train.startup import open_prepared_data

    resolved = check.same.resolved
    data = open_prepared_data(resolved)
    for split in ("train", "valid"):
        data.samples(split, resolved.run.data, resolved.seq_len, seed=0)


def _compare(
    check: ResumeCheck, arguments: argparse.Namespace, argv: Sequence[str], folder: Path
) -> int:
    from fgpt.distributed.local_ranks import run_local_ranks
    from fgpt.parity.resume import as_json, check_resume, render

    def start(names: Sequence[str], n: int) -> int:
        more = ["--train", ",".join(names), "--folder", str(folder)]
        return run_local_ranks(["resume-check", *argv, *more], n)

    def say(line: str) -> None:
        print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    verdicts = check_resume(check, folder, start, say, keep=arguments.keep is not None)
    if arguments.json:
        print(json.dumps(as_json(check, verdicts), indent=1))
    else:
        # piped output has no terminal width, and the table is wide
        render(check, verdicts, Console(width=None if sys.stdout.isatty() else 140))
    return 1 if any(verdict.departures for verdict in verdicts) else 0


def _train(check: ResumeCheck, arguments: argparse.Namespace, world: World) -> int:
    """Be one rank of the runs named in --train."""
    from fgpt.parity.resume_layouts import planned_runs
    from fgpt.parity.resume_rank import train_runs

    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout is the table's, or the JSON's
    runs = planned_runs(check, arguments.folder)
    return train_runs([runs[name] for name in arguments.train.split(",")], world)
