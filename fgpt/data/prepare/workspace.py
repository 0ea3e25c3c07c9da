"""The directory beside a data set where it is made, OUT.parts, kept over an interruption.

    OUT.parts/key        what the parts were made from
    OUT.parts/tokenizer.* the tokenizer, if it was learned
    OUT.parts/NNNNNN.*   finished parts
    OUT.tmp              the data set while it is put together

Parts count only for the same recipe, sources, tokenizer and encoder: anything else is removed.
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
from fgpt.data.files import sync_directory, write_durably
from fgpt.data.prepare.parts import Part
from fgpt.errors import DataError


@dataclass(frozen=True)
class Workspace:
    """The places around one data set. The caller holds its lock."""

    target: Path
    """The data set's directory."""

    @property
    def parts(self) -> Path:
        """Finished parts."""
        return self._beside(".parts")

    @property
    def _tmp(self) -> Path:
        return self._beside(".tmp")

    @property
    def _old(self) -> Path:
        return self._beside(".old")

    def _beside(self, suffix: str) -> Path:
        return self.target.with_name(self.target.name + suffix)

    def clear_leftovers(self) -> None:
        """Remove what a killed run left half-done; finished parts stay."""
        shutil.rmtree(self._tmp, ignore_errors=True)
        if self._old.exists() and not self.target.exists():
            self._old.rename(self.target)  # killed between the two renames of `commit`
        shutil.rmtree(self._old, ignore_errors=True)
        if self.parts.exists():
            for left in self.parts.glob("*.tmp"):
                left.unlink()

    def refuse_foreign(self) -> None:
        """Raise DataError if something that is no data set has the target's name."""
        if not self.target.exists() or (self.target / CARD_NAME).exists():
            return
        if not self.target.is_dir() or any(self.target.iterdir()):
            raise DataError(f"{self.target}: exists and is not a data set; choose another --out")

    def open_parts(self, key: Iterable[str]) -> None:
        """Make the directory of parts, or keep the one that was made for the same `key`."""
        wanted = hashlib.sha256("\0".join(key).encode()).hexdigest()
        file = self.parts / "key"
        if not file.exists() or file.read_text() != wanted:
            self.drop_parts()
            write_durably(file, wanted.encode())

    def finished(self) -> dict[int, Part]:
        """The finished parts that are as they were written, by number."""
        numbers = (int(path.stem) for path in self.parts.glob("*.json") if path.stem.isdigit())
        parts = (Part.read(self.parts, number) for number in numbers)
        return {part.number: part for part in parts if part is not None}

    def drop_parts(self) -> None:
        """Remove the parts, whatever they are of."""
        shutil.rmtree(self.parts, ignore_errors=True)

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
