"""The command line of a training run: what every rank does, from its arguments to its exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence

from rich.console import Console

from fgpt.config.flags import add_run_flags, request_of
from fgpt.config.resolve import resolve
from fgpt.errors import FgptError

# How long the other ranks wait with their exit, so that launchers do not kill rank 0 before it has
# printed its one line.
LEADER_GRACE_S = 5.0


def parser() -> argparse.ArgumentParser:
    """The arguments of launchers/train.py."""
    arguments = argparse.ArgumentParser(
        prog="launchers/train.py", description="Train a GPT on DeepSpeed, as two JSON files say."
    )
    add_run_flags(arguments)
    arguments.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|PATH",
        help="auto: go on from the run directory's newest checkpoint, if any; none: start afresh and"
        " move an earlier run aside; PATH: a checkpoint or run directory (default: none)",
    )
    # the deepspeed launcher adds this; LOCAL_RANK says the same
    arguments.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run one rank; returns its exit code. Errors that a user can meet are one line on stderr."""
    arguments = parser().parse_args(argv)
    from fgpt.engine.launch import World, announced, leave

    world = World(rank=int(os.environ.get("RANK", "0") or 0))  # until it is known for certain
    try:
        world = announced(os.environ)
        return _run(arguments, world)
    except FgptError as error:
        return _fail(world.leads, f"fgpt: {error}", error.exit_code)
    except Exception:
        traceback.print_exc()
        return _fail(world.leads, f"fgpt: rank {world.rank}: this is a bug in FGPT", 70)
    finally:
        leave()


def _run(arguments: argparse.Namespace, world) -> int:  # type: ignore[no-untyped-def]
    from fgpt.engine.accelerate import launched_by_accelerate, same_json
    from fgpt.engine.launch import device_kind, join
    from fgpt.train.run import run
    from fgpt.train.start import Setting

    request = request_of(arguments)
    kind = device_kind()
    resolved = resolve(request, world=world.size, device=kind)
    by_accelerate = launched_by_accelerate(os.environ)
    if by_accelerate:
        same_json(os.environ, request.ds_config)
    os.environ.setdefault("DS_ACCELERATOR", kind)  # or DeepSpeed looks for one, with warnings
    device = join(world, os.environ)
    console = Console(quiet=not world.leads, soft_wrap=True)
    return run(
        Setting(resolved, world, device, console), arguments.resume, accelerate=by_accelerate
    )


def _fail(leads: bool, text: str, code: int) -> int:
    if leads:
        print(text, file=sys.stderr, flush=True)
    else:
        time.sleep(LEADER_GRACE_S)
    return code
