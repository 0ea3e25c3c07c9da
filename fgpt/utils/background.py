"""One call in a thread that does not outlive the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundCall(Generic[T]):
    """Runs a function in a daemon thread: an exiting process does not wait for it."""

    def __init__(self, function: Callable[[], T]):
        self._function = function
        self._result: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fgpt-save", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # raised by `result`, in the caller's thread
            self._error = error

    def is_done(self) -> bool:
        """Whether `result` returns or raises at once."""
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for the function and return its result, or raise its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result
