"""The command line of launchers/train.py: one rank, from its arguments to its exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from fgpt.cli.arguments import ArgumentParser
from fgpt.cli.run_flags import add_run_flags, request_of, with_home
from fgpt.config.resolve import resolve
from fgpt.errors import FgptError
from fgpt.utils.console import protect_console
from fgpt.utils.deadlines import exit_after
from fgpt.utils.process import exit_with_parent
from fgpt.utils.startup_signals import signals_exit_at_once

if TYPE_CHECKING:
    from fgpt.distributed.launch import World
    from fgpt.train.run import Observer

AGREED_S = 1.0
"""Time for rank 0 to say an error of all ranks, and to be the first to exit, in seconds: on NCCL it
waits in its cleanup for the others."""
SHUTDOWN_S = 60.0
"""Limit for destroying process groups: NCCL may wait there for a rank that has died."""
EXAMPLES = (
    "deepspeed --num_gpus 2 launchers/train.py --ds_config ds_configs/zero2.json",
    "torchrun --standalone --nproc-per-node 4 launchers/train.py --ds_config ds_configs/zero1.json"
    " --tp 2 --pp 2 --data data/prepared/mine",
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of launchers/train.py."""
    arguments = ArgumentParser(
        prog="launchers/train.py",
        description="Train a GPT on DeepSpeed, configured by two JSONs.",
        examples=EXAMPLES,
    )
    add_run_flags(arguments)
    arguments.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|PATH",
        help="auto: continue from the run directory's newest checkpoint, if any; none: start afresh"
        " and rename an earlier run; PATH: a checkpoint or run directory (default: none). When"
        " torchrun or Slurm restarts the run, it goes on from its newest checkpoint in any case",
    )
    arguments.add_argument(
        "--allow",
        type=_allowed,
        default=(),
        metavar="KIND,...",
        help="let the resumed run differ from the checkpoint in its data, batch, seq_len, seed or"
        " model (same shapes); the run's history records it",
    )
    # the deepspeed launcher adds this; LOCAL_RANK has the same value
    arguments.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return arguments


def _allowed(text: str) -> tuple[str, ...]:
    """Parse --allow."""
    from fgpt.checkpoint.identity import ALLOWABLE

    kinds = tuple(part.strip() for part in text.split(",") if part.strip())
    for kind in kinds:
        if kind not in ALLOWABLE:
            raise argparse.ArgumentTypeError(
                f"{kind!r} is none of {', '.join(ALLOWABLE)}; separate several by commas"
            )
    return kinds


def main(argv: Sequence[str], make_observer: Callable[[], Observer] | None = None) -> int:
    """Run one rank; returns its exit code. Prints an FgptError as one line on stderr.

    `make_observer` is called once the trainer is imported.
    """
    exit_with_parent(os.environ)
    protect_console()
    arguments = parser().parse_args(with_home(argv))
    # DeepSpeed calls functions that torch has deprecated, in every step of the first run
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
    # DeepSpeed gathers partitioned activations in the backward pass, outside of autograd
    warnings.filterwarnings("ignore", message="c10d::.* an autograd kernel was not registered")
    with signals_exit_at_once():
        from fgpt.distributed.launch import (
            World,
            hard_exit,
            print_error,
            shutdown,
            world_from_environment,
        )
        from fgpt.train.failure import RANK0_GRACE_S, let_rank0_report, reason_of

    world = World()  # until the environment is read
    try:
        world = world_from_environment(os.environ)
        code = _run(arguments, world, make_observer)
    except KeyboardInterrupt:
        hard_exit(world.rank, "interrupted", 128 + signal.SIGINT)
    except Exception as error:  # raised by all ranks, or before they have met
        reason = reason_of(error)
        if reason.traceback:
            traceback.print_exc()
        agreed = isinstance(error, FgptError) and error.agreed
        if isinstance(error, FgptError) and not world.is_rank0:
            let_rank0_report(AGREED_S if agreed else RANK0_GRACE_S)
        if world.size > 1 and not agreed:
            # other ranks may wait for this one in a collective; a cleanup would wait for them
            hard_exit(world.rank, reason.text, reason.exit_code)
        if world.is_rank0:  # all ranks have this error
            print_error(world.rank, reason.text)
        code = reason.exit_code
    with exit_after(SHUTDOWN_S, code):
        shutdown()
        sys.stdout.flush()  # through the protection: the interpreter's own flush would fail
    return code


def _run(
    arguments: argparse.Namespace, world: World, make_observer: Callable[[], Observer] | None
) -> int:
    with signals_exit_at_once():
        from fgpt.distributed.launch import (
            device_kind,
            group_timeout,
            init_process_group,
            launched_by_accelerate,
        )
        from fgpt.train.run import run
        from fgpt.train.startup import RunContext

    request = request_of(arguments)
    kind = device_kind()
    resolved = resolve(request, world=world.size, device=kind)
    by_accelerate = launched_by_accelerate(os.environ)
    if by_accelerate:
        from fgpt.engine.deepspeed.accelerate import check_data_parallel, check_same_json

        check_same_json(os.environ, request.ds_config)
        check_data_parallel(resolved.batch)
    if resolved.run.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    os.environ.setdefault("DS_ACCELERATOR", kind)  # else DeepSpeed probes for one, with warnings
    with signals_exit_at_once():
        timeout = group_timeout(resolved.run.train.watchdog_s)
        device = init_process_group(world, os.environ, timeout=timeout)
    console = Console(quiet=not world.is_rank0, soft_wrap=True)
    context = RunContext(resolved, world, device, console)
    return run(
        context,
        arguments.resume,
        allow=arguments.allow,
        accelerate=by_accelerate,
        observer=None if make_observer is None else make_observer(),
        exits=True,
    )
