"""`python -m fgpt.acceptance`: the checks of a GPU in one command (README.md)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fgpt.acceptance.check import CHECKS
from fgpt.acceptance.run import REPORT, run_gpu_check
from fgpt.errors import FgptError


def main() -> int:
    """Parse the flags and run; errors are one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m fgpt.acceptance", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: stand-ins (default: cuda)")
    add("--out", type=Path, default=REPORT, metavar="FILE", help=f"the report (default: {REPORT})")
    add("--only", nargs="+", default=(), metavar="CHECK", help="only these checks")
    add("--again", action="store_true", help="repeat what has passed, too")
    add("--minutes", type=float, default=10.0, metavar="M", help="start no check after (10)")
    add("--list", action="store_true", help="print the checks")
    arguments = parser.parse_args()
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
    except FgptError as error:
        print(f"fgpt: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
