"""The manifest: written last, it makes a directory a checkpoint and lists and hashes every file.

The hashes detect damage, not forgery: anyone who can write the files can write the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.engine.base import SavedFile
from fgpt.errors import CheckpointError
from fgpt.utils.files import sha256_file, write_atomic

FILE = "manifest.json"
VERSION = 1
HASH_KEY = "sha256 of the rest"


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    step: int
    """Optimizer steps taken."""
    samples_seen: int
    """Data position: samples consumed by all ranks together."""
    identity: dict[str, Any]
    """What a resume may not change (model, data, layout, precision, seeds)."""
    config: dict[str, Any]
    """The resolved configuration, for information."""
    files: tuple[SavedFile, ...]
    """Every file of the checkpoint except this one."""
    version: int = VERSION
    """Version of the format."""
    is_permanent: bool = False
    """Whether it is kept for ever (`checkpoint.keep_every`)."""
    valid_loss: float | None = None
    """Validation loss at this step, nats per token; None: not evaluated at this step."""

    def write(self, directory: Path) -> None:
        """Write and fsync manifest.json. Raises OSError."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        text = json.dumps(values | {HASH_KEY: _hash(values)}, indent=1, sort_keys=True)
        write_atomic(directory / FILE, text.encode())


def read_manifest(directory: Path) -> Manifest:
    """Read manifest.json.

    Raises CheckpointError if it is missing, damaged or of another format, OSError if it cannot be
    read.
    """
    path = directory / FILE
    try:
        values = json.loads(path.read_text())
        if values.pop(HASH_KEY) != _hash(values):
            raise CheckpointError(f"{path}: its contents have changed since it was written")
        files = tuple(SavedFile(**entry) for entry in values.pop("files"))
        manifest = Manifest(files=files, **values)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: no {FILE}: the checkpoint was never completed"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    if manifest.version != VERSION:
        raise CheckpointError(
            f"{path}: format version {manifest.version}, this FGPT reads version {VERSION}"
        )
    return manifest


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_files(directory: Path, manifest: Manifest, share: int = 0, shares: int = 1) -> None:
    """Compare the files with the manifest; hash only every `shares`-th, from number `share` on.

    Raises CheckpointError naming the first file that is missing, unknown, a link, or different,
    OSError if one cannot be read.
    """
    listed = {entry.name for entry in manifest.files} | {FILE}
    present = {entry.name for entry in os.scandir(directory)}
    if present - listed:
        raise CheckpointError(f"{directory / min(present - listed)}: not in the manifest")
    for i, entry in enumerate(manifest.files):
        path = directory / entry.name
        if entry.name not in present:
            raise CheckpointError(f"{path}: missing")
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path}: not a regular file")
        size = path.stat().st_size
        if size != entry.size_bytes:
            raise CheckpointError(f"{path}: {size} bytes, the manifest says {entry.size_bytes}")
        if i % shares == share and sha256_file(path, follow_symlinks=False) != entry.sha256:
            raise CheckpointError(f"{path}: its contents have changed since it was written")
