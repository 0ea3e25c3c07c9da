"""Peak memory of a process with its children."""

from __future__ import annotations

import subprocess
import time

import psutil

from fgpt.errors import UserError
from fgpt.utils.process import tree_resident_bytes

POLL_S = 0.01


def peak_rss_bytes(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; return the largest resident memory seen of it and its children, in bytes.

    Raises UserError if it fails.
    """
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        peak = max(peak, tree_resident_bytes(watched))
        time.sleep(POLL_S)
    if process.returncode:
        raise UserError(f"the process to measure ended with exit code {process.returncode}")
    return peak
