"""Errors of the fast encoders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fgpt.errors import DataError


class FastEncoderUnavailable(DataError):
    """A fast encoder is not installed, does not support this tokenizer, or failed."""


@contextmanager
def as_unavailable(message: str) -> Iterator[None]:
    """Raise FastEncoderUnavailable for any error of a library, Rust panics included (they are no
    Exception).
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FastEncoderUnavailable(f"{message} ({reason})") from error
