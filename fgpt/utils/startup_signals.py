"""Signals while a rank imports modules and waits for the other ranks: one line, no traceback.

Imports nothing but the standard library, so that a script can use it first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def signals_exit_at_once() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM print one line and exit with 130 and 143.

    A KeyboardInterrupt in the middle of an import surfaces as any error of any library, and not at
    all while C++ code waits for other ranks: so a thread reads the signals' numbers from a pipe.
    """
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=_exit_on, args=(read, numbers), daemon=True).start()
    previous_descriptor = signal.set_wakeup_fd(write)
    # only signals with a Python handler are written to the pipe; this thread waits for its end
    previous = {number: signal.signal(number, lambda *_: time.sleep(60)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_descriptor)
        os.close(write)


def _exit_on(descriptor: int, numbers: list[signal.Signals]) -> None:
    while received := os.read(descriptor, 1):
        if received[0] in numbers:
            name = signal.Signals(received[0]).name
            with suppress(OSError, ValueError):  # the terminal may be closed
                print(f"fgpt: stopped by {name} while starting", file=sys.stderr, flush=True)
            os._exit(128 + received[0])
    os.close(descriptor)
