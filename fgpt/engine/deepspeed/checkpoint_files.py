"""DeepSpeed's file access, replaced by FGPT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from fgpt.engine.base import SavedFile
from fgpt.engine.tensor_files import read_tensors, write_tensors


class Files(CheckpointEngine):
    """DeepSpeed's file access, so that a failed write leaves no other rank in a barrier.

    An error is kept until the ranks have left DeepSpeed's save, where they wait for each other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: list[SavedFile] = []
        self.error: OSError | None = None

    def begin(self) -> None:
        """A new save."""
        self.written, self.error = [], None

    def finish(self) -> list[SavedFile]:
        """What the save has written. Raises OSError if a write failed."""
        if self.error is not None:
            raise self.error
        return self.written

    def create(self, info: Any) -> None:
        """Nothing to announce."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, unless one of this save has failed already."""
        if self.error is not None:
            return
        try:
            self.written.append(write_tensors(state_dict, Path(path)))
        except OSError as error:
            self.error = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file, without unpickling code."""
        return read_tensors(Path(path), map_location)

    def commit(self, info: Any) -> bool:
        """Committing is `fgpt.checkpoint`'s."""
        return True
