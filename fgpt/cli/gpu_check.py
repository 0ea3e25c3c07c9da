"""`fgpt doctor --gpu`: the checks of a GPU in one command (fgpt/acceptance/README.md)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fgpt.cli.arguments import ArgumentParser, file_path


def gpu_check_verb(argv: Sequence[str]) -> int:
    """Run the checks; returns 1 if one failed or had no time. Raises FgptError."""
    from fgpt.acceptance.check import CHECKS
    from fgpt.acceptance.run import REPORT, run_gpu_check

    arguments = _parser(REPORT).parse_args(argv)
    if arguments.list:
        for check in CHECKS:
            print(f"  {check.name:<16} {check.what}")
        return 0
    try:
        return run_gpu_check(
            arguments.out,
            device=arguments.device,
            only=arguments.only,
            again=arguments.again,
            minutes=arguments.minutes,
        )
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is missing", file=sys.stderr)
        return 130


def _parser(report: Path) -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt doctor --gpu",
        description="Check everything of FGPT that runs on a GPU, against a CPU or a slower way; a"
        " second call goes on with what is missing or has failed.",
        examples=["fgpt doctor --gpu", "fgpt doctor --gpu --device cpu --only masks resume"],
    )
    add = parser.add_argument
    add("--gpu", action="store_true", help=argparse.SUPPRESS)
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: stand-ins (default: cuda)")
    add(
        "--out",
        type=file_path,
        default=report,
        metavar="FILE",
        help=f"the report (default: {report})",
    )
    add("--only", nargs="+", default=(), metavar="CHECK", help="only these checks")
    add("--again", action="store_true", help="repeat what has passed, too")
    add("--minutes", type=float, default=10.0, metavar="M", help="start no check after (10)")
    add("--list", action="store_true", help="print the checks")
    return parser
