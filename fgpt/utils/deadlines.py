"""Limits in time for what may hang: file systems, pipes, the destruction of process groups."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def within(limit_s: float, function: Callable[[], T], default: T) -> T:
    """Return the function's result, or `default` if it fails or takes longer than `limit_s`.

    A function that takes longer goes on in a thread of its own, which does not keep the process.
    """
    results: list[T] = []

    def call() -> None:
        with contextlib.suppress(Exception):  # callers are leaving: that is what matters
            results.append(function())

    thread = threading.Thread(target=call, daemon=True)
    with contextlib.suppress(RuntimeError, MemoryError):  # no further thread can be started
        thread.start()
        thread.join(limit_s)
    return results[0] if results else default


@contextlib.contextmanager
def exit_after(limit_s: float, exit_code: int) -> Iterator[None]:
    """End the process, with the code, if what is inside takes longer than `limit_s` seconds."""
    timer = threading.Timer(limit_s, os._exit, (exit_code,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
