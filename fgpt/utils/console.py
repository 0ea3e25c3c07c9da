"""Standard output and error that cannot end a run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class SafeStream:
    """A text stream that drops what it cannot write: its reader is gone, its disk is full, or its
    terminal has another encoding. Everything else is the wrapped stream's.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write `text`, or drop it and everything later."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            self._close()
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it and everything later."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._close()

    def _close(self) -> None:
        """Send all later output, also the interpreter's own at its exit, to the null device."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def protected_stderr() -> Iterator[None]:
    """Protect sys.stderr: a reader of messages that goes away (`2>&1 | head`) ends no verb.

    Names with undecodable bytes are written escaped, to stdout as well.
    """
    original = sys.stderr
    sys.stderr = SafeStream(original)
    try:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stdout: Any = sys.stdout  # not every stream can be reconfigured
            stdout.reconfigure(errors="backslashreplace")
        yield
    finally:
        sys.stderr = original


def protect_console() -> None:
    """Replace sys.stdout and sys.stderr by `SafeStream`s. For entry points."""
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)
