"""Checkpoint files: hashed while being written, synced to disk, read without unpickling code."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from fgpt.engine.base import SavedFile
from fgpt.errors import CheckpointError

PLAIN_FILE = "plain_engine.pt"
"""The plain engine's only file; all other names are DeepSpeed's."""


class _HashingFile:
    """A binary file that hashes what is written, and keeps the OSError that torch would hide."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.hash = hashlib.sha256()
        self.size_bytes = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:  # write(2) takes 2 GiB at most, and less when the disk is nearly full
            try:
                n = self.file.write(view)
            except OSError as error:
                self.error = error
                raise
            self.hash.update(view[:n])
            self.size_bytes += n
            view = view[n:]
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def write_tensors(value: Any, path: Path) -> SavedFile:
    """`torch.save` into a new file and fsync it. Raises OSError (disk full, ...)."""
    with open(path, "xb", buffering=0) as raw:
        file = _HashingFile(raw)
        try:
            torch.save(value, cast(BinaryIO, file))
        except (OSError, RuntimeError) as error:
            if file.error is None:
                raise
            raise OSError(file.error.errno, file.error.strerror, str(path)) from error
        os.fsync(raw.fileno())
    return SavedFile(path.name, file.size_bytes, file.hash.hexdigest())


def read_tensors(path: Path, map_location: Any = "cpu") -> Any:
    """Load a file of `write_tensors`: tensors, numbers, text and containers only.

    Raises CheckpointError if the file is damaged or its pickle names any other code.
    """
    try:
        with torch.serialization.safe_globals(_allowed_types(path)):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises pickle, zip, runtime and OS errors for damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint file: {reason}") from error


def refuse_code(path: Path) -> None:
    """Raise CheckpointError if the file's pickle names code that `read_tensors` refuses.

    Reads only the names, so that all ranks can agree on the result before any of them loads. Raises
    OSError if the file cannot be read.
    """
    try:
        with torch.serialization.safe_globals(_allowed_types(path)):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except OSError:
        raise
    except Exception as error:  # as in read_tensors
        raise CheckpointError(f"{path}: cannot be read as a checkpoint file: {error}") from error
    if names:
        raise CheckpointError(f"{path}: refused: it would run code ({', '.join(sorted(names))})")


def _allowed_types(path: Path) -> list[Any]:
    """Return the data classes that DeepSpeed pickles into its optimizer files."""
    if path.name == PLAIN_FILE:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]
