"""The files of a folder that a corpus is made of, by name."""

from __future__ import annotations

import os
import sysconfig
from dataclasses import dataclass
from typing import Literal

from fgpt.errors import DataError
from fgpt.prepare.sources.formats import PLAIN, READERS
from fgpt.prepare.sources.spans import inner_suffix

LIBRARY_SKIP = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Listing:
    """Which files: those of a path that are of a known kind, or of Python's standard library."""

    path: str
    """A folder or file."""
    what: Literal["texts", "library"] = "texts"
    """All files of known kinds, without hidden ones; or Python sources, without packages."""

    @property
    def root(self) -> str:
        """The folder that names are relative to."""
        return self.path if os.path.isdir(self.path) else os.path.dirname(self.path) or "."

    def names(self) -> list[str]:
        """Names below the root, sorted by their parts.

        Links to folders are not followed. Raises DataError: nothing usable, a folder that cannot be
        read.
        """
        if os.path.isfile(self.path):
            found = [os.path.basename(self.path)]
        elif os.path.isdir(self.path):
            found = self._walk()
        else:
            raise DataError(f"{self.path}: no such file or folder; give the corpus with --input")
        usable = [name for name in found if self._is_usable(name)]
        if not usable:
            others = sorted({os.path.splitext(name)[1] or name for name in found})[:8]
            seen = f"; found only {', '.join(others)}" if others else "; it is empty"
            raise DataError(f"{self.path}: no usable file{seen}; needs {self._needs()}")
        return sorted(usable, key=lambda name: name.split("/"))

    def _needs(self) -> str:
        if self.what == "library":
            return "Python sources (install them, or use a local corpus)"
        return f"{' '.join(READERS)} files (all but the last also as .gz or .zst)"

    def _walk(self) -> list[str]:
        found: list[str] = []
        left = [""]
        while left:
            prefix = left.pop()
            for entry in self._entries(prefix):
                if not _is_folder(entry):
                    found.append(prefix + entry.name)
                elif not entry.is_symlink():
                    left.append(f"{prefix}{entry.name}/")
        return found

    def _entries(self, prefix: str) -> list[os.DirEntry[str]]:
        folder = os.path.join(self.path, prefix)
        try:
            with os.scandir(folder) as entries:
                return [entry for entry in entries if self._is_wanted(entry.name)]
        except OSError as error:
            what = f"cannot be read ({error.strerror}); grant it, or move it away"
            raise DataError(f"{folder.rstrip(os.sep)}: {what}") from error

    def _is_wanted(self, name: str) -> bool:
        return name not in LIBRARY_SKIP if self.what == "library" else not name.startswith(".")

    def _is_usable(self, name: str) -> bool:
        if self.what == "library":
            return name.endswith(".py")
        if name.endswith(PLAIN):
            return True
        kind = inner_suffix(name)
        # a .parquet file is compressed inside
        return kind in READERS and (kind != ".parquet" or name.lower().endswith(kind))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in circles
        return False


def library() -> Listing:
    """The sources of the running Python's standard library."""
    return Listing(sysconfig.get_path("stdlib"), "library")
