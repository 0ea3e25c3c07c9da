"""Checks for the runner's tests: each does what its name says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from fgpt.acceptance.check import Findings


def passes(found: Findings) -> None:
    found.figure("speed", 3.0, "tokens/s")
    found.skip("a kernel")


def exceeds(found: Findings) -> None:
    found.figure("error", 2e-3, "relative", at_most=1e-3)
    found.figure("nothing", float("nan"), "nats", at_most=1.0)


def raises(found: Findings) -> None:
    raise ValueError("no such kernel\nand more")


def crashes(found: Findings) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(found: Findings) -> None:
    """With a child that outlives it, unless its session is killed."""
    sleep = "import time; time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", sleep])
    (found.work.parent / "child").write_text(str(child.pid))
    time.sleep(600)
