"""The trainer under python, torchrun, deepspeed or accelerate.

with Launch(["torchrun", "--nproc-per-node", "2", ...], "--ds_config", ...) as launch:
    launch.ranks()      process ids
    launch.wait()       the launcher's exit code
    launch.descendants() == []   no orphans
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.ranks import GONE_S, ROOT, TIMEOUT_S, kill, scratch, wait_until

TRAIN = ROOT / "launchers" / "train.py"


class Launch:
    """`launcher... launchers/train.py flags...` in a session of its own, from the repository root.

    A context manager that leaves no descendant alive, in any session.
    """

    def __init__(
        self, launcher: Sequence[str], *flags: object, env: Mapping[str, str] | None = None
    ):
        self.mark = uuid.uuid4().hex  # identifies descendants
        self._file = scratch(self) / "output"
        command = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:], str(TRAIN)]
        with open(self._file, "w") as out:
            self.process = subprocess.Popen(
                [*command, *map(str, flags)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "FGPT_TEST": self.mark} | (env or {}),
                start_new_session=True,
            )

    def descendants(self) -> list[psutil.Process]:
        """Return every living process of this launch except the launcher."""
        return [p for p in psutil.process_iter() if p.pid != self.process.pid and self._ours(p)]

    def ranks(self) -> list[int]:
        """Return the process ids in rank order."""
        found = {}
        for process in self.descendants():
            with contextlib.suppress(psutil.Error, KeyError):
                # a launcher has the script on its command line too, but no RANK
                if str(TRAIN) in process.cmdline():
                    found[int(process.environ()["RANK"])] = process.pid
        return [found[rank] for rank in sorted(found)]

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Return the launcher's exit code (-N: signal N). Timeout: kill all, fail."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still ran after {timeout_s} s\n{self.output()}") from None

    def wait_until_gone(self, timeout_s: float) -> None:
        """Wait for the last descendant's end; fails the test after `timeout_s`."""
        t0 = time.monotonic()
        wait_until(lambda: not self.descendants(), timeout_s, f"orphans end\n{self.output()}")
        GONE_S.append(time.monotonic() - t0)

    def output(self) -> str:
        """Return the output of all processes so far."""
        return self._file.read_text()

    def kill(self) -> None:
        """Send SIGKILL to all."""
        for process in self.descendants():
            kill(process.pid)
        kill(self.process.pid)
        self.process.wait()

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _ours(self, process: psutil.Process) -> bool:
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and process.environ().get("FGPT_TEST") == self.mark
        except psutil.Error:
            return False
