"""Where a data set OUT is made: hidden directories beside it, the first kept over an interruption.

    .OUT.fgpt-parts/key          what the parts were made from
                    tokenizer.*  the tokenizer, if it was learned
                    exact        there, if the fast encoder was found to differ
                    NNNNNN.*     finished parts
    .OUT.fgpt-tmp                the data set while it is put together
    .OUT.fgpt-old                the one that is being replaced

Parts count only for the same recipe, sources, tokenizer and software: others are removed. In the
end the parts and the data set are there together: twice its size on disk, with --force three times.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fgpt.data.card import CARD_NAME
from fgpt.errors import DataError
from fgpt.prepare.parts import Part
from fgpt.utils.files import LockHeldError, file_lock, sync_directory, write_atomic


@contextmanager
def exclusive_writer(target: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of the data set `target`. Raises DataError if another process does, unless
    `wait`.
    """
    path = target.with_name(target.name + ".lock")
    try:
        with file_lock(path, wait=wait):
            yield
    except LockHeldError as error:
        raise DataError(f"{path}: being written by process {error.pid}; wait for it") from None


@dataclass(frozen=True)
class Workspace:
    """The places around one data set. The caller holds its lock."""

    target: Path
    """The data set's directory."""

    @property
    def parts(self) -> Path:
        """Finished parts."""
        return self._beside("parts")

    @property
    def _tmp(self) -> Path:
        return self._beside("tmp")

    @property
    def _old(self) -> Path:
        return self._beside("old")

    def _beside(self, what: str) -> Path:
        # a name that no user gives a folder of theirs: it is removed without asking
        return self.target.with_name(f".{self.target.name}.fgpt-{what}")

    def clear_leftovers(self) -> None:
        """Remove what a killed run left half-done; finished parts stay."""
        shutil.rmtree(self._tmp, ignore_errors=True)
        if self._old.exists() and not self.target.exists():
            self._old.rename(self.target)  # killed between the two renames of `commit`
        shutil.rmtree(self._old, ignore_errors=True)
        if self.parts.exists():
            for left in self.parts.glob("*.tmp"):
                left.unlink(missing_ok=True)

    def refuse_foreign(self) -> None:
        """Raise DataError if something that is no data set has the target's name."""
        if not self.target.exists() or (self.target / CARD_NAME).exists():
            return
        if not self.target.is_dir() or any(self.target.iterdir()):
            raise DataError(f"{self.target}: exists and is not a data set; choose another --out")

    def open_parts(self, key: Iterable[str], *, keep: bool = False) -> None:
        """Make the directory of parts, or keep the one that was made for the same `key`.

        `keep`: what is there is kept whatever it was made for.
        """
        wanted = hashlib.sha256("\0".join(key).encode()).hexdigest()
        file = self.parts / "key"
        if not file.exists() or file.read_text() != wanted:
            if not keep:
                self.drop_parts()
            write_atomic(file, wanted.encode())

    def finished(self) -> dict[int, Part]:
        """The finished parts that are as they were written, by number."""
        numbers = (int(path.stem) for path in self.parts.glob("*.json") if path.stem.isdigit())
        parts = (Part.read(self.parts, number) for number in numbers)
        return {part.number: part for part in parts if part is not None}

    def drop_parts(self) -> None:
        """Remove the parts, whatever they are of; the key first, so that none outlives it."""
        (self.parts / "key").unlink(missing_ok=True)
        if self.parts.exists():
            shutil.rmtree(self.parts)

    @property
    def is_exact(self) -> bool:
        """Whether the fast encoder was found to give other ids for these parts' corpus."""
        return (self.parts / "exact").exists()

    def begin_exactly(self, key: Iterable[str]) -> None:
        """Begin the parts again, and remember that it is to be with the exact encoder."""
        self.drop_parts()
        write_atomic(self.parts / "exact", b"")
        self.open_parts(key, keep=True)

    @contextmanager
    def putting_together(self) -> Iterator[Path]:
        """The directory to write the data set into; it gets its name if all goes well."""
        self._tmp.mkdir(parents=True)
        try:
            yield self._tmp
            self._commit()
        finally:
            shutil.rmtree(self._tmp, ignore_errors=True)

    def _commit(self) -> None:
        """Give what was put together its name, replacing a data set of that name."""
        sync_directory(self._tmp)
        if self.target.exists():
            self.target.rename(self._old)
        os.rename(self._tmp, self.target)
        sync_directory(self.target.parent)
        shutil.rmtree(self._old, ignore_errors=True)
        self.drop_parts()
