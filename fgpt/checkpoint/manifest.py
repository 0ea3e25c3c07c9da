"""What makes a directory a checkpoint: a manifest, written last, that names and hashes every file.

The hashes show damage, not authorship: who can write the files can write the manifest.
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
SEAL = "sha256 of the rest"


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    step: int
    """Optimizer steps taken."""
    samples_seen: int
    """Data position: samples consumed by all ranks together."""
    identity: dict[str, Any]
    """What must be the same to continue the run (model, data, layout, precision, seeds)."""
    config: dict[str, Any]
    """The resolved configuration, for the reader."""
    files: tuple[SavedFile, ...]
    """Every file of the checkpoint but this one."""
    version: int = VERSION
    """Of this format."""

    def write(self, directory: Path) -> None:
        """Write and sync; raises OSError."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        text = json.dumps(fields | {SEAL: _seal(fields)}, indent=1, sort_keys=True)
        write_atomic(directory / FILE, text.encode())


def read_manifest(directory: Path) -> Manifest:
    """Raises CheckpointError when there is none, or it is not one of ours."""
    path = directory / FILE
    try:
        fields = json.loads(path.read_text())
        if fields.pop(SEAL) != _seal(fields):
            raise CheckpointError(f"{path}: its contents have changed since it was written")
        files = tuple(SavedFile(**entry) for entry in fields.pop("files"))
        manifest = Manifest(files=files, **fields)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: no {FILE}: the checkpoint was never completed"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    if manifest.version != VERSION:
        raise CheckpointError(
            f"{path}: format version {manifest.version}, this FGPT reads version {VERSION}"
        )
    return manifest


def _seal(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def check_files(directory: Path, manifest: Manifest, share: int = 0, of: int = 1) -> None:
    """Compare the files on disk with the manifest; hash the share-th of `of` equal parts of them.

    Raises CheckpointError naming the first file that is missing, unknown, a link, or different.
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
        if i % of == share and sha256_file(path, follow_symlinks=False) != entry.sha256:
            raise CheckpointError(f"{path}: its contents have changed since it was written")
