"""`fgpt train`: a launch command, started again after failures."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fgpt.cli.arguments import ArgumentParser
from fgpt.errors import UserError, printable

if TYPE_CHECKING:
    from fgpt.config.field_syntax import Ranges
    from fgpt.train.supervisor import SupervisedRun

TRAIN = Path(__file__).parents[2] / "launchers" / "train.py"
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
RESTARTS = 3


def train_verb(argv: Sequence[str]) -> int:
    """Run the command behind `--` to its end; returns the exit code. Raises UserError."""
    own, dashes, command = _partition(argv)
    arguments = _parser().parse_args(own)
    if not dashes:
        _parser().error("write -- and the launch command behind it, or only the flags of a run")
    launcher, flags = split_command(command)
    from fgpt.train.supervisor import Supervisor

    return Supervisor(supervised_run(launcher, flags, arguments), _report).run()


def _partition(argv: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """The arguments before and after the first --, and whether there is one."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], at < len(words), words[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt train",
        usage="fgpt train [--max-restarts N] [--skip_bad_batches K] -- COMMAND...",
        description="Run a launch command on this node, and after a failure start it again with"
        " --resume auto. The command is one that runs launchers/train.py; flags of a run alone are"
        " run by torchrun, with a rank for each GPU (without any: one rank).",
        examples=[
            "fgpt train --max-restarts 10 -- torchrun --standalone --nproc-per-node 2"
            " launchers/train.py --ds_config ds_configs/zero2.json",
            "fgpt train -- --ds_config ds_configs/zero2.json --steps 1000",
        ],
    )
    parser.add_argument(
        "--max-restarts",
        "--max_restarts",
        type=_count,
        default=RESTARTS,
        metavar="N",
        help=f"starts after the first one (default: {RESTARTS})",
    )
    parser.add_argument(
        "--skip_bad_batches",
        "--skip-bad-batches",
        type=_count,
        default=0,
        metavar="K",
        help="leave out the samples of up to K batches at which a fault has repeated (default: 0)",
    )
    return parser


def _count(text: str) -> int:
    """argparse type: an integer from 0 to 10^9."""
    number = int(text) if text.isdecimal() and len(text) <= 10 else -1
    if not 0 <= number <= 10**9:
        raise argparse.ArgumentTypeError(f"{text[:20]} is not a whole number from 0 to 10^9")
    return number


def split_command(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the launcher with its script, and the run's flags, of what follows the `--`.

    Raises UserError if there is no script.
    """
    words = list(command)
    if not words or words[0].startswith("-"):
        return [*_torchrun(), str(TRAIN)], words
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    if not scripts:
        raise UserError(
            f"fgpt train -- {printable(' '.join(words))}: no launchers/train.py in it: write the"
            " whole launch command, or only the flags of a run"
        )
    return words[: scripts[0] + 1], words[scripts[0] + 1 :]


def _torchrun() -> list[str]:
    """torchrun of this Python with a rank for each GPU, or one rank."""
    if not TRAIN.exists():
        raise UserError(f"{TRAIN} does not exist: write the whole launch command behind --")
    # in another process: in this one torch would stay in memory during the run
    counted = subprocess.run([sys.executable, "-c", COUNT_GPUS], capture_output=True, text=True)
    ranks = max(1, int(counted.stdout)) if counted.stdout.strip().isdecimal() else 1
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*module, "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]


def supervised_run(
    launcher: Sequence[str], flags: Sequence[str], arguments: argparse.Namespace
) -> SupervisedRun:
    """Return the run of a launch command. Raises UserError if its directory is not known."""
    from fgpt.cli.run_flags import request_of
    from fgpt.cli.train import parser
    from fgpt.config.derive import derive_run
    from fgpt.config.field_syntax import joined_ranges, parse_ranges, ranges_text
    from fgpt.config.run_file import load
    from fgpt.train.supervisor import SupervisedRun

    given = parser().parse_args(list(flags))
    request = request_of(given)
    loaded = load(request.run_file, request.overrides)
    if loaded.run.train.init_from is not None and loaded.run.run_dir is None:
        raise UserError("--init_from: the run directory depends on these weights: add --run_dir")
    run = derive_run(loaded.run, request.ds_config, loaded.invalid).run
    own_skipped = parse_ranges(run.data.skip_samples or "")

    def command(resume: bool, skipped: Ranges) -> list[str]:
        words = [*launcher, *flags]
        if resume:
            words = [*launcher, *_without_resume(flags), "--resume", "auto"]
        if skipped:
            every = ranges_text(joined_ranges([*own_skipped, *skipped]))
            words.append(f"--set=data.skip_samples={every}")
        return words

    return SupervisedRun(
        Path(str(run.run_dir)),
        command,
        arguments.max_restarts,
        arguments.skip_bad_batches,
        resumes=given.resume == "auto",
    )


def _without_resume(flags: Sequence[str]) -> list[str]:
    """The flags of a run without --resume and its value."""
    words = iter(flags)
    kept = []
    for word in words:
        if word == "--resume":
            next(words, None)
        elif not word.startswith("--resume="):
            kept.append(word)
    return kept


def _report(text: str) -> None:
    """Print one line; a closed or full output does not end the run."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(f"fgpt train: {text}"), flush=True)
