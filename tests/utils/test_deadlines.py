"""What hangs holds a process for its limit, no longer."""

from __future__ import annotations

import subprocess
import sys
import time

from fgpt.utils.deadlines import within
from tests.ranks import ROOT

HANGS = """
import time
from fgpt.utils.deadlines import exit_after
with exit_after(30, 3):
    pass
with exit_after(0.2, 7):
    time.sleep(60)
"""


def test_a_function_in_time_and_one_that_hangs_or_fails() -> None:
    t0 = time.monotonic()
    assert within(5, lambda: "result", "default") == "result"
    assert within(5, lambda: 1 // 0, 2) == 2
    assert within(0.2, lambda: time.sleep(60), "default") == "default"  # type: ignore[arg-type]
    assert time.monotonic() - t0 < 5


def test_a_process_ends_in_time() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, timeout=30)
    assert done.returncode == 7
