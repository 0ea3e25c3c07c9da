"""The directory in which a verb trains its own runs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fgpt.errors import UserError


@contextlib.contextmanager
def working_folder(keep: Path | None, verb: str) -> Iterator[Path]:
    """A temporary directory, removed at the end, or the new directory of --keep.

    Raises UserError.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix=f"fgpt-{verb}-") as folder:
            yield Path(folder)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            raise UserError(f"--keep {keep}: is not empty; name a new directory")
    except OSError as error:
        raise UserError(f"--keep {keep}: {error.strerror}; name a new directory") from error
    yield keep.absolute()
