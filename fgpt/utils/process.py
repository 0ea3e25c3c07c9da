"""A rank ends when its launcher does, however that died: no orphan trains on (Linux).

The kernel sends SIGTERM when the parent dies. Above `deepspeed`'s launch.py there is one more
process, the one the user started and kills, which dies without a word to those below: a thread
waits for its end.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

PR_SET_PDEATHSIG = 1  # prctl(2)


def exit_with_parent(environ: Mapping[str, str]) -> None:
    """Arrange for SIGTERM at the launcher's death. Called first, so that little can go unnoticed.

    One started by hand is nobody's rank: `nohup python launchers/train.py` outlives its shell.
    """
    if sys.platform != "linux" or not {"RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"} & {*environ}:
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel knew
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
