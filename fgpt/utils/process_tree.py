"""A command and everything that it starts, in whatever session."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from fgpt.errors import TrainingError
from fgpt.utils.process import PR_SET_PDEATHSIG

POLL_S = 0.05
KILL_TIMEOUT_S = 30.0
"""Time for killed processes to end, in seconds."""

# becomes the command, to which the kernel sends SIGTERM when its parent dies: a function between
# fork and exec, which could do the same, may hang in a process with threads
_TIED_TO_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGTERM)})
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class ProcessTree:
    """A running command in a new session, and its descendants.

    They are known by a variable in their environment: launchers start ranks in new sessions, and a
    killed launcher leaves them to process 1. If this process dies, the command gets SIGTERM (Linux
    only).
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        output: Path | None = None,
    ):
        """`environment`: variables besides this process's own. `output`: the file of stdout and
        stderr; None: this process's own. Raises OSError if there is no such command.
        """
        if shutil.which(command[0]) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
        if sys.platform == "linux":
            tied = [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid())]
            command = [*tied, *command]
        self._mark = f"FGPT_TREE_{uuid.uuid4().hex}"
        with contextlib.ExitStack() as opened:
            file = None if output is None else opened.enter_context(output.open("w"))
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=None if file is None else subprocess.STDOUT,
                env=os.environ | (environment or {}) | {self._mark: "1"},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process id of the command."""
        return self._process.pid

    def wait(self, timeout_s: float) -> int | None:
        """Return the command's exit code, 128 + n for signal n; None: it still runs."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """Send a signal to the command, which passes it on if it is a launcher."""
        self._process.send_signal(number)

    def alive(self) -> list[psutil.Process]:
        """Return every process that has not ended."""
        return [process for process in psutil.process_iter() if self._has(process)]

    def kill(self) -> None:
        """Send SIGKILL to all, until none is left. Raises TrainingError if one stays."""
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while alive := self.alive():
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"process {alive[0].pid} outlives SIGKILL: it waits for a device or a file"
                    " system; a new start would meet it"
                )
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self._process.poll()  # reaps it
            time.sleep(POLL_S)

    def _has(self, process: psutil.Process) -> bool:
        try:
            is_zombie = process.status() == psutil.STATUS_ZOMBIE
            return not is_zombie and self._mark in process.environ()
        except psutil.Error:
            return False  # it has ended, or is another user's
