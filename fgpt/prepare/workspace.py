"""Temporary directories beside a data set OUT; the parts survive an interruption.

    .OUT.fgpt-parts/key          hash of the inputs of the parts
                    tokenizer.*  the tokenizer, if it was learned
                    exact        exists if the fast encoder was found to differ
                    NNNNNN.*     finished parts
    .OUT.fgpt-tmp                the new data set, until it is complete
    .OUT.fgpt-old                the data set being replaced

Parts are reused only for the same recipe, sources, tokenizer and software; others are deleted. At
the end, the parts and the data set exist together: twice its size on disk, three times with
--force.
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
from fgpt.prepare.parts import ShardPart
from fgpt.utils.files import LockHeldError, file_lock, sync_directory, write_atomic


@contextmanager
def dataset_lock(target: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of the data set `target`.

    Raises DataError if another process holds it, unless `wait`.
    """
    path = target.with_name(target.name + ".lock")
    try:
        with file_lock(path, wait=wait):
            yield
    except LockHeldError as error:
        raise DataError(
            f"{path}: process {error.pid} is writing this data set; wait until it has finished"
        ) from None


@dataclass(frozen=True)
class Workspace:
    """The directories of one data set. The caller holds its lock."""

    target: Path

    @property
    def parts_dir(self) -> Path:
        return self._beside("parts")

    @property
    def _tmp(self) -> Path:
        return self._beside("tmp")

    @property
    def _old(self) -> Path:
        return self._beside("old")

    def _beside(self, purpose: str) -> Path:
        # a name that cannot be a user's directory, because it is deleted without confirmation
        return self.target.with_name(f".{self.target.name}.fgpt-{purpose}")

    def remove_leftovers(self) -> None:
        """Remove incomplete files of a killed run; finished parts stay."""
        shutil.rmtree(self._tmp, ignore_errors=True)
        if self._old.exists() and not self.target.exists():
            self._old.rename(self.target)  # killed between the two renames of `_commit`
        shutil.rmtree(self._old, ignore_errors=True)
        if self.parts_dir.exists():
            for path in self.parts_dir.glob("*.tmp"):
                path.unlink(missing_ok=True)

    def check_target(self) -> None:
        """Raise DataError if the target exists and is neither a data set nor empty."""
        if not os.path.lexists(self.target) or (self.target / CARD_NAME).exists():
            return
        if not self.target.is_dir() or any(self.target.iterdir()):
            raise DataError(f"{self.target}: exists and is not a data set; choose another --out")

    def open_parts(self, key: Iterable[str], *, keep: bool = False) -> None:
        """Create the directory of parts. Parts of another `key` are deleted, unless `keep`."""
        digest = hashlib.sha256("\0".join(key).encode()).hexdigest()
        file = self.parts_dir / "key"
        if not file.exists() or file.read_text() != digest:
            if not keep:
                self.delete_parts()
            write_atomic(file, digest.encode())

    def load_parts(self) -> dict[int, ShardPart]:
        """Return the finished, undamaged parts, by number."""
        paths = self.parts_dir.glob("*.json")
        numbers = (int(path.stem) for path in paths if path.stem.isdigit())
        parts = (ShardPart.load(self.parts_dir, number) for number in numbers)
        return {part.number: part for part in parts if part is not None}

    def delete_parts(self) -> None:
        """Delete the parts; the key first, so that a key never outlives some of its parts."""
        (self.parts_dir / "key").unlink(missing_ok=True)
        if self.parts_dir.exists():
            shutil.rmtree(self.parts_dir)

    @property
    def is_exact(self) -> bool:
        """True if the fast encoder was found to give other ids for this corpus."""
        return (self.parts_dir / "exact").exists()

    def restart_exact(self, key: Iterable[str]) -> None:
        """Delete the parts, and record that the exact encoder is needed."""
        self.delete_parts()
        write_atomic(self.parts_dir / "exact", b"")
        self.open_parts(key, keep=True)

    @contextmanager
    def staging_directory(self) -> Iterator[Path]:
        """Yield a directory for the new data set; it is renamed to the target without an error."""
        self._tmp.mkdir(parents=True)
        try:
            yield self._tmp
            self._commit()
        finally:
            shutil.rmtree(self._tmp, ignore_errors=True)

    def _commit(self) -> None:
        # 1. the new data set is durable (its files were fsynced) before it replaces the old one
        sync_directory(self._tmp)
        # 2. move the old one away: a non-empty directory cannot be replaced by a rename
        if self.target.exists():
            self.target.rename(self._old)
        # 3. from here on the new one has the name; `remove_leftovers` undoes step 2 before that
        os.rename(self._tmp, self.target)
        sync_directory(self.target.parent)
        # 4. delete what is no longer needed
        shutil.rmtree(self._old, ignore_errors=True)
        self.delete_parts()
