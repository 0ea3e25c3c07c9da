"""Why a fast encoder cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fgpt.errors import DataError


class NoFastEncoder(DataError):
    """A fast encoder is not there, or cannot read this tokenizer or text."""


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Make a NoFastEncoder of anything a library raises, a panic (no Exception) included."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NoFastEncoder(f"{what} ({reason})") from error
