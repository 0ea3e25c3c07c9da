"""Signals that end a run: after the step with a checkpoint, or at once where that cannot be."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import torch

from fgpt.distributed.progress import Progress
from fgpt.train.loop import DeferredMax

SECOND_SIGNAL_S = 3.0
"""The same signal after this time, in seconds, ends the process at once. Sooner it changes nothing:
after Ctrl-C, a terminal and the launcher both signal each rank."""
POLL_S = 1.0


class StopSignals:
    """Records SIGTERM, SIGINT and SIGHUP; the ranks agree after each step whether any received one.

    SIGHUP, which a closed terminal sends, stays ignored under nohup. Launchers signal one rank
    after the other, seconds apart: without the agreement the first rank would leave the others
    waiting in a collective. On a GPU the agreement is read one step late.

    A main thread that is blocked in C++ runs no signal handler; so a thread reads the signals from
    a pipe, and ends the process at a second signal, or after `grace_s` without progress (longer in
    a save and where steps are slow: `Progress.stop_limit_s`).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(
        self,
        device: torch.device,
        progress: Progress,
        grace_s: float,
        end: Callable[[str, int], object],
    ):
        """`end` prints a text and exits with a code."""
        self.received = 0
        self._highest = DeferredMax(device, 0)
        self.exit_code = 0
        """128 + the signal, as shells report it; 0 until all ranks have agreed to stop."""
        self._progress, self._grace_s, self._end = progress, grace_s, end
        self._parent = os.getppid()
        self._numbers = [
            number
            for number in self.SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        ]
        self._before = {number: signal.signal(number, self._record) for number in self._numbers}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write)
        self._thread = threading.Thread(target=self._watch, name="fgpt-signals", daemon=True)
        self._thread.start()

    @property
    def stopping(self) -> bool:
        """True once the ranks have agreed to stop."""
        return self.exit_code > 0

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = max(self.received, number)

    def __call__(self) -> bool:
        """Return True if the ranks stop now; equal on every rank."""
        number = self._highest(self.received)
        self.exit_code = 128 + number if number else 0
        return self.stopping

    def close(self) -> None:
        """End the thread. Signals change nothing until `restore`: the report is being written."""
        signal.set_wakeup_fd(-1)
        os.close(self._write)
        self._thread.join()

    def restore(self) -> None:
        """Handle signals as before this object."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _watch(self) -> None:
        times: dict[int, float] = {}
        """When each signal came first."""
        while True:
            wait_s = POLL_S if times else None
            if select.select([self._read], [], [], wait_s)[0]:
                received = os.read(self._read, 1)
                if not received:
                    os.close(self._read)
                    return
                number = received[0]
                if number not in self._numbers:
                    continue
                waited_s = time.monotonic() - times.setdefault(number, time.monotonic())
                # the death of a launcher sends SIGTERM once for each of its threads, which may end
                # seconds apart on a busy machine; the guardian limits the time then
                if waited_s > SECOND_SIGNAL_S and os.getppid() == self._parent:
                    self._end(f"ended at once by a second {_name(number)}", 128 + number)
            if times:
                number, since_s = next(iter(times.items()))
                waited_s = min(time.monotonic() - since_s, self._progress.age_s())
                if waited_s > self._progress.stop_limit_s(self._grace_s):
                    self._end(
                        f"ended at once: {_name(number)}, then no progress for {waited_s:.0f} s",
                        128 + number,
                    )


def _name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
