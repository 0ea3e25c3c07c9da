"""This process: its memory, and its end when its launcher ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1  # prctl(2)


def resident_bytes() -> int:
    """Resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def anonymous_bytes() -> int:
    """Resident memory of this process without pages of mapped files, in bytes."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def tree_resident_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and its descendants, in bytes; 0 once it has ended."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def reset_peak_resident() -> None:
    """Restart `peak_resident_bytes` at the present value, where the kernel allows it (Linux)."""
    with contextlib.suppress(OSError):  # forbidden in some containers
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def peak_resident_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # not Linux
        fields = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split(maxsplit=1)
        return int(fields[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def exit_with_parent(environ: Mapping[str, str]) -> None:
    """Have the kernel send SIGTERM to this rank when its launcher dies (Linux).

    `deepspeed` runs two processes above each rank: launch.py, which the kernel watches for us, and
    the one that the user started and may kill, which a thread watches. A process that was started
    by hand is not a rank and outlives its shell: `nohup python launchers/train.py`.
    """
    if sys.platform != "linux" or not {"RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"} & {*environ}:
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before prctl
        _end()
    if "deepspeed.launcher.launch" in _command(parent):
        above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        if "deepspeed" in _command(above):
            threading.Thread(target=_wait_for, args=(os.pidfd_open(above),), daemon=True).start()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _wait_for(process: int) -> None:
    select.select([process], [], [])
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
