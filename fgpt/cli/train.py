"""The command line of launchers/train.py: one rank, from its arguments to its exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from fgpt.cli.arguments import ArgumentParser
from fgpt.cli.run_flags import add_run_flags, request_of, with_home
from fgpt.config.resolve import resolve
from fgpt.errors import FgptError, LostRankError, TrainingError
from fgpt.utils.console import protect_console
from fgpt.utils.process import exit_with_parent
from fgpt.utils.startup_signals import signals_exit_at_once

if TYPE_CHECKING:
    from fgpt.distributed.launch import World

RANK0_GRACE_S = 5.0
"""Time for rank 0 to report an error and for its launcher to end the other ranks, in seconds."""
EXIT_BUG = 70
EXAMPLES = (
    "deepspeed --num_gpus 2 launchers/train.py --ds_config ds_configs/zero2.json",
    "torchrun --standalone --nproc-per-node 4 launchers/train.py --ds_config ds_configs/zero1.json"
    " --tp 2 --pp 2 --data data/prepared/mine",
)
OUT_OF_MEMORY = (
    "-> make train_micro_batch_size_per_gpu smaller and gradient_accumulation_steps larger, add"
    ' "activation_checkpointing": {}, shard more (ds_configs/README.md), or choose a smaller model'
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


def main(argv: Sequence[str]) -> int:
    """Run one rank; returns its exit code. Prints an FgptError as one line on stderr."""
    exit_with_parent(os.environ)
    protect_console()
    arguments = parser().parse_args(with_home(argv))
    # DeepSpeed calls functions that torch has deprecated, in every step of the first run
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
    # DeepSpeed gathers partitioned activations in the backward pass, outside of autograd
    warnings.filterwarnings("ignore", message="c10d::.* an autograd kernel was not registered")
    with signals_exit_at_once():
        import torch

        from fgpt.distributed.launch import (
            World,
            hard_exit,
            lost_rank_reason,
            print_error,
            shutdown,
            world_from_environment,
        )

    world = World()  # until the environment is read
    try:
        world = world_from_environment(os.environ)
        return _run(arguments, world)
    except LostRankError as error:
        hard_exit(world.rank, str(error), error.exit_code)
    except FgptError as error:
        if not world.is_rank0:
            _let_rank0_report()
        print_error(world.rank, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print_error(world.rank, "interrupted")
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            first = str(error).splitlines()[0]
            hard_exit(world.rank, f"{first} {OUT_OF_MEMORY}", TrainingError.exit_code)
        if isinstance(error, RuntimeError) and (reason := lost_rank_reason(error)):
            hard_exit(world.rank, f"another rank is gone ({reason})", LostRankError.exit_code)
        traceback.print_exc()
        # other ranks may wait for this one in a collective; a cleanup would wait for them
        hard_exit(world.rank, "this is a bug in FGPT", EXIT_BUG)
    finally:
        shutdown()
        sys.stdout.flush()  # through the protection: the interpreter's own flush would fail


def _run(arguments: argparse.Namespace, world: World) -> int:
    with signals_exit_at_once():
        from fgpt.distributed.launch import device_kind, init_process_group, launched_by_accelerate
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
        device = init_process_group(world, os.environ)
    console = Console(quiet=not world.is_rank0, soft_wrap=True)
    context = RunContext(resolved, world, device, console)
    return run(context, arguments.resume, allow=arguments.allow, accelerate=by_accelerate)


def _let_rank0_report() -> None:
    """Wait for the launcher to end this rank, because most errors occur on all ranks.

    A rank that is still alive afterwards has an error that rank 0 has not, and reports it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(RANK0_GRACE_S)
