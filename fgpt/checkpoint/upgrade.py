"""`fgpt checkpoint upgrade`: checkpoints of format version 1 become ones of the present format.

    1. the files of step_N are compared with its manifest, the disk must have room
    2. each old rank's part of the state is written to a file of step_N.tmp, then a manifest
    3. step_N.tmp is read and compared with its manifest
    4. step_N becomes step_N.v1, step_N.tmp becomes step_N; `latest` and `best` name it as before

step_N.v1 is left to the user. After a kill before the second rename of 4 the next upgrade begins
again: it finds step_N or, where there is none, step_N.v1. The lock of the run directory is held.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fgpt.checkpoint.directory import NAME, SPARE_BYTES, CheckpointDirectory, locate
from fgpt.checkpoint.manifest import (
    Manifest,
    Start,
    check_file,
    check_names,
    merge_records,
    read_manifest,
)
from fgpt.checkpoint.reader import CheckpointReader
from fgpt.checkpoint.tensor_file import file_header, parts_of, stream, write_file
from fgpt.checkpoint.version1 import Manifest1, read_manifest1
from fgpt.checkpoint.version1_state import State1
from fgpt.engine.state import Progress
from fgpt.errors import CheckpointError
from fgpt.utils.fault_injection import fault_point
from fgpt.utils.files import LockHeldError, file_lock, sync_directory

OLD = ".v1"
"""What the name of a checkpoint ends with once it has been converted."""
_IDENTITY = ("model.", "data", "train.seed", "global batch")
"""Beginnings of the names in an identity that a resume still compares."""
_LAYOUT = {
    "ranks": "number of ranks",
    "tp": "tensor-parallel ranks (tp)",
    "pp": "pipeline stages (pp)",
    "cp": "context-parallel ranks (cp)",
    "ZeRO": "ZeRO stage",
    "precision": "precision",
    "engine": "train.engine",
}
"""Name in a history (`fgpt.checkpoint.identity.run_layout`) -> in an identity of version 1."""
_DATA_DEFAULTS = {
    "data.packing": "stream",
    "data.document_mask": False,
    "data.reset_positions": False,
}
"""Values of runs that began before FGPT had these fields."""


def upgrade(path: Path) -> Iterator[str | CheckpointError]:
    """Convert a checkpoint, or those of a run directory; yields a line or an error for each.

    Raises CheckpointError if there is none, or a run writes there, OSError.
    """
    directory, only = locate(path)
    root = directory.root
    if not root.is_dir():
        raise CheckpointError(_no_checkpoint(path))
    try:
        with file_lock(root.parent / "lock", wait=False):
            yield from _upgrade(path, directory, only)
    except LockHeldError as error:
        raise CheckpointError(
            f"{root.parent}: a run (process {error.pid}) writes here; stop it first"
        ) from error


def _no_checkpoint(path: Path) -> str:
    return (
        f"{path}: no checkpoint there; name a run directory or one of its checkpoints/step_NNNNNNNN"
    )


def _upgrade(
    path: Path, directory: CheckpointDirectory, only: Path | None
) -> Iterator[str | CheckpointError]:
    # 1. what a killed upgrade left
    for old in directory.root.glob(f"step_*{OLD}"):
        checkpoint = old.with_suffix("")
        was_killed = _partial(checkpoint).exists() or checkpoint == only
        if was_killed and NAME.fullmatch(checkpoint.name) and not checkpoint.exists():
            old.rename(checkpoint)
    # 2. each checkpoint, the newest first: a resume must not find an older one instead
    found = directory.complete()
    if only is not None:
        found = [checkpoint for checkpoint in found if checkpoint == only]
    if not found:
        raise CheckpointError(_no_checkpoint(path))
    is_current = True
    for checkpoint in found:
        try:
            manifest = read_manifest1(checkpoint)
            if manifest is not None:
                is_current = False
                yield _convert(checkpoint, manifest)
        except CheckpointError as error:
            is_current = False
            yield error
    if is_current:
        yield f"{path}: nothing to do: in the present format already"


def _partial(checkpoint: Path) -> Path:
    """The directory in which a checkpoint is written."""
    return checkpoint.with_name(checkpoint.name + ".tmp")


def _convert(checkpoint: Path, old: Manifest1) -> str:
    """Replace a checkpoint by one of the present format; returns what was done.

    Raises CheckpointError if it stays as it is.
    """
    kept, partial = checkpoint.with_name(checkpoint.name + OLD), _partial(checkpoint)
    try:
        if kept.exists():
            raise CheckpointError(f"{kept}: exists: move it away")
        check_names(checkpoint, old.files)
        for file in old.files:
            check_file(checkpoint, file)
        _check_space(checkpoint, old)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            manifest = _write(checkpoint, old, partial)
            fault_point("before_set_aside", 0, old.step)
            checkpoint.rename(kept)
            fault_point("before_rename", 0, old.step)
            partial.rename(checkpoint)
        except BaseException:
            if not checkpoint.exists():
                kept.rename(checkpoint)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_directory(checkpoint.parent)
    except OSError as error:
        raise CheckpointError(f"{error.filename or partial}: {error.strerror}") from error
    size = sum(file.size_bytes for file in manifest.files) / 2**30
    return (
        f"{checkpoint}: converted; {len(manifest.files)} files, {size:.3f} GiB; the old one is kept"
        f" as {kept.name}: delete it when you no longer need it"
    )


def _check_space(checkpoint: Path, old: Manifest1) -> None:
    """Raise CheckpointError if the disk has no room for another checkpoint of this size."""
    needed = SPARE_BYTES + sum(file.size_bytes for file in old.files)
    free = shutil.disk_usage(checkpoint).free
    if free < needed:
        missing = -(-(needed - free) // 2**20)
        raise CheckpointError(
            f"{checkpoint}: No space left on device: {free / 2**20:.1f} MiB are free, about"
            f" {missing} MiB too few"
        )


def _write(checkpoint: Path, old: Manifest1, partial: Path) -> Manifest:
    """Write the files and the manifest of a checkpoint into `partial`, and read them again.

    Raises CheckpointError if the checkpoint cannot be converted, OSError.
    """
    try:
        manifest = _write_files(State1(checkpoint, old), partial)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: cannot be converted: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{checkpoint}: cannot be converted: its contents are not those of its layout: {reason}"
        ) from error
    manifest.write(partial)
    CheckpointReader(partial, read_manifest(partial))  # every tensor is complete
    check_names(partial, manifest.files)
    for file in manifest.files:
        check_file(partial, file)
    return manifest


def _write_files(state: State1, partial: Path) -> Manifest:
    """Write a file for each rank; returns the manifest. Raises CheckpointError, OSError."""
    old = state.manifest
    files, records, progress = [], [], Progress(old.step)
    for rank in state.ranks():
        parts, tensors = parts_of(rank.tensors)
        path = partial / f"rank_{rank.rank:05d}.safetensors"
        files.append(write_file(path, file_header(parts), stream(parts)))
        records.append({name: tensor.to_json() for name, tensor in tensors.items()})
        progress = replace(rank.progress, updates=max(progress.updates, rank.progress.updates))
    layout = {name: old.identity[of_old] for name, of_old in _LAYOUT.items()}
    if layout["engine"] == "plain":
        layout["ZeRO"] = None
    manifest = Manifest(
        progress=progress,
        samples_seen=old.samples_seen,
        tokens_seen=old.samples_seen * old.identity["data.seq_len"],
        identity=_DATA_DEFAULTS
        | {n: v for n, v in old.identity.items() if n.startswith(_IDENTITY)},
        config=old.config,
        optimizer=old.identity["optimizer"],
        history=(Start(0, 0, layout),),
        files=tuple(files),
        tensors=merge_records(records),
        is_permanent=old.is_permanent,
        valid_loss=old.valid_loss,
    )
    if {n: t.shape for n, t in manifest.tensors.items()} != state.shapes:
        raise CheckpointError("it lacks parameters of its model")
    return manifest
