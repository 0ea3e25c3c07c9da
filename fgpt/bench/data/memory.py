"""Resident memory of a process and its children (Linux)."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from fgpt.errors import UserError

POLL_S = 0.01


def resident_bytes(pid: int, kind: str = "VmRSS") -> int:
    """Resident memory of one process in bytes, 0 if it is gone.

    `kind`: VmRSS with, RssAnon without the pages of mapped files, which processes share.
    """
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{kind}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def peak_rss_bytes(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; the largest sum over it and its children seen on the way.

    Raises UserError if it fails.
    """
    peak = 0
    while process.poll() is None:
        family = [process.pid, *_children(process.pid)]
        peak = max(peak, sum(map(resident_bytes, family)))
        time.sleep(POLL_S)
    if process.returncode:
        raise UserError(f"the process to measure ended with exit code {process.returncode}")
    return peak


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]
