"""Standard output and error that cannot end a run."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


class Outage:
    """Says once that something cannot be written, and how often that happened once it can be."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self.count = 0
        """Failures since the last success."""

    def failed(self, message: str) -> None:
        """Count a failure; say the first."""
        self.count += 1
        if self.count == 1:
            self._say(message)

    def succeeded(self, message: str) -> None:
        """Say, after failures, that they are over."""
        if self.count:
            self._say(f"{message}, after {self.count} failed writes")
        self.count = 0


class SafeStream:
    """A text stream that drops what it cannot write: its reader is gone, its disk is full, or its
    terminal has another encoding. Everything else is the wrapped stream's.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._dropped = 0
        """Failed writes that no line in the output has named yet."""
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write `text`, or drop it; once there is room again, say that something is missing."""
        with self._failures():
            if self._dropped:
                self._stream.flush()
                count, self._dropped = self._dropped, 0
                self._stream.write(f"\nfgpt: output is missing here: {count} writes failed\n")
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        with self._failures():
            self._stream.flush()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EBADF):
                self._close()
            self._dropped += 1
        except ValueError:
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
    open_missing_streams()
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
    open_missing_streams()
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)


def open_missing_streams() -> None:
    """Send to the null device what a program prints that was started with closed descriptors."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
