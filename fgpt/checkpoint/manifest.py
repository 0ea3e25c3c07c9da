"""The manifest: written last, it makes a directory a checkpoint. It lists and hashes the files, and
says where each logical tensor is.

The hashes detect damage, not forgery: anyone who can write the files can write the manifest.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.checkpoint.boxes import Box
from fgpt.checkpoint.tensor_file import DTYPE_NAMES, SavedBox, SavedFile, TensorRecord
from fgpt.engine.state import EMA, WEIGHT, Progress
from fgpt.errors import CheckpointError, DataError
from fgpt.utils.files import read_regular, sha256_file, write_atomic
from fgpt.utils.json_dataclass import from_json

FILE = "manifest.json"
VERSION = 2
HASH_KEY = "sha256 of the rest"
DTYPES = set(DTYPE_NAMES.values())


@dataclass(frozen=True)
class Start:
    """One start of a run, recorded in its checkpoints."""

    step: int
    """Step that it began at."""
    tokens: int
    """Tokens seen until then."""
    layout: dict[str, Any]
    """Ranks, grid, engine and precision (see `fgpt.checkpoint.identity.run_layout`)."""
    changes: tuple[str, ...] = ()
    """What --allow let differ from the checkpoint: `name: old -> new`."""
    origin: str = ""
    """Where its weights are from, if they are neither initial values nor the run's own."""
    base_model: str = ""
    """The name of these weights on the Hugging Face Hub, if they are from there."""


@dataclass(frozen=True, kw_only=True)
class SaveInfo:
    """What a run says of the state that it saves."""

    samples_seen: int
    """Data position: number of the next sample in the run's data."""
    tokens_seen: int
    """Tokens trained on, by all ranks together."""
    identity: dict[str, Any]
    """What a resume may not change without --allow (model, data, batch, seeds)."""
    config: dict[str, Any]
    """The resolved configuration, for information."""
    optimizer: str
    """Type of the optimizer whose states these are."""
    history: tuple[Start, ...]
    """The starts of the run; the last one wrote this checkpoint."""
    valid_loss: float | None = None
    """Validation loss at this step, nats per token; None: not evaluated at this step."""


@dataclass(frozen=True, kw_only=True)
class Manifest(SaveInfo):
    """The contents of manifest.json."""

    progress: Progress
    """Steps taken, skipped steps, updates of the optimizer states, loss scale."""
    files: tuple[SavedFile, ...]
    """Every file of the checkpoint except this one."""
    tensors: dict[str, TensorRecord]
    """Logical name -> shape, states and boxes."""
    version: int = VERSION
    """Version of the format."""
    is_permanent: bool = False
    """Whether it is kept for ever (`checkpoint.keep_every`)."""

    @property
    def step(self) -> int:
        """Optimizer steps taken, skipped ones included."""
        return self.progress.step

    @property
    def origin(self) -> str:
        """Where the weights of the newest start that began with others are from; empty: nowhere."""
        return next((start.origin for start in reversed(self.history) if start.origin), "")

    @property
    def states(self) -> list[str]:
        """The optimizer states of the parameters, without the weights."""
        names = dict.fromkeys(name for record in self.tensors.values() for name in record.states)
        return [name for name in names if name not in (WEIGHT, EMA)]

    @property
    def has_average(self) -> bool:
        """Whether there is a moving average of the weights (train.ema)."""
        return all(EMA in record.states for record in self.tensors.values())

    def write(self, directory: Path) -> None:
        """Write and fsync manifest.json. Raises OSError."""
        tensors = {name: record.to_json() for name, record in self.tensors.items()}
        values = dataclasses.asdict(dataclasses.replace(self, tensors={})) | {"tensors": tensors}
        values = json.loads(json.dumps(values))
        values |= {HASH_KEY: manifest_hash(values)}
        lines = [f"{json.dumps(key)}: {_text(values[key])}" for key in sorted(values)]
        write_atomic(directory / FILE, ("{\n" + ",\n".join(lines) + "\n}").encode())


def _text(value: Any) -> str:
    """JSON with a line for each entry of a table, as there are many tensors."""
    if isinstance(value, dict) and any(isinstance(entry, dict) for entry in value.values()):
        lines = [f" {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(lines) + "\n}"
    return json.dumps(value)


def read_values(directory: Path) -> dict[str, Any]:
    """Return what manifest.json has, of any version.

    Raises CheckpointError if it is missing or damaged, OSError if it cannot be read.
    """
    path = directory / FILE
    try:
        values = json.loads(read_regular(path))
        if values.pop(HASH_KEY) != manifest_hash(values):
            raise CheckpointError(f"{path}: its contents have changed since it was written")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: no {FILE}: the checkpoint was never completed"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise CheckpointError(f"{path}: {error.strerror}") from error
    assert isinstance(values, dict)  # it has a key
    return values


def read_manifest(directory: Path) -> Manifest:
    """Read manifest.json.

    Raises CheckpointError if it is missing, damaged or of another format, OSError if it cannot be
    read.
    """
    values = read_values(directory)
    _check_version(directory, values.get("version"))
    try:
        tensors = merge_records([values.pop("tensors")])
        manifest = from_json(Manifest, values | {"tensors": {}}, str(directory / FILE))
    except (ValueError, TypeError, KeyError, AttributeError, DataError) as error:
        raise CheckpointError(f"{directory / FILE}: damaged: {error}") from error
    manifest = dataclasses.replace(manifest, tensors=tensors)
    if impossible := _impossible_value(manifest):
        raise CheckpointError(f"{directory / FILE}: damaged: {impossible}")
    return manifest


def _impossible_value(manifest: Manifest) -> str:
    """A value that no save writes; empty: none."""
    progress = manifest.progress
    counts = {
        "samples_seen": manifest.samples_seen,
        "tokens_seen": manifest.tokens_seen,
        "step": progress.step,
        "skipped_steps": progress.skipped_steps,
        "updates": progress.updates or 0,
    }
    for name, count in counts.items():
        if count < 0:
            return f"{name} is {count}"
    for file in manifest.files:
        if file.name in ("", ".", "..") or "/" in file.name:
            return f"the file name {file.name!r}"
    for name, record in manifest.tensors.items():
        if WEIGHT not in record.states or not set(record.states.values()) <= DTYPES:
            return f"the states of {name} are {record.states}"
    return "" if manifest.tensors and manifest.history else "it has no tensors or no history"


def merge_records(of_files: Sequence[dict[str, Any]]) -> dict[str, TensorRecord]:
    """Return the tensors of a checkpoint from records in JSON: one manifest's, or each rank's,
    whose boxes are then in the file of that number.

    Raises ValueError, TypeError, KeyError or AttributeError for what is no record.
    """
    merged: dict[str, TensorRecord] = {}
    for number, records in enumerate(of_files):
        for name, record in records.items():
            shape, states = _sizes(record["shape"]), dict(record["states"])
            whole = merged.setdefault(str(name), TensorRecord(shape, states, []))
            if (whole.shape, whole.states) != (shape, states):
                raise ValueError(f"{name} has two shapes or two sets of states")
            for file, offsets, sizes, phase in record["boxes"]:
                box = Box(_sizes(offsets), _sizes(sizes))
                file, phase = _sizes([file, phase])
                whole.boxes.append(SavedBox(file + number, box, phase))
    return dict(sorted(merged.items()))


def _sizes(values: Any) -> tuple[int, ...]:
    """Counts of a JSON list. Raises ValueError, TypeError for anything else."""
    if any(type(value) is not int or value < 0 for value in values):
        raise ValueError(f"{values!r} are no counts")
    return tuple(values)


def _check_version(directory: Path, version: Any) -> None:
    """Raise CheckpointError for a manifest of another format."""
    if version == 1:
        raise CheckpointError(
            f"{directory}: is in the format of an earlier FGPT: convert it with fgpt checkpoint"
            f" upgrade {directory}"
        )
    if version != VERSION:
        raise CheckpointError(
            f"{directory}: format version {version}, this FGPT reads version {VERSION}: upgrade it"
        )


def manifest_hash(values: dict[str, Any]) -> str:
    """The hash of a manifest's values, without its own."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_names(directory: Path, files: Iterable[SavedFile]) -> None:
    """Raise CheckpointError for a file that is missing or not one of the manifest's `files`."""
    listed = {entry.name for entry in files} | {FILE}
    present = {entry.name for entry in os.scandir(directory)}
    for name in sorted(present - listed):
        raise CheckpointError(f"{directory / name}: not in the manifest")
    for name in sorted(listed - present):
        raise CheckpointError(f"{directory / name}: missing; copy the whole checkpoint again")


def check_file(directory: Path, entry: SavedFile) -> None:
    """Compare size and hash of a file with the manifest.

    Raises CheckpointError if it is a link or different, OSError if it cannot be read.
    """
    path = directory / entry.name
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: not a regular file")
    size = path.stat().st_size
    if size != entry.size_bytes:
        raise CheckpointError(f"{path}: {size} bytes, the manifest says {entry.size_bytes}")
    if sha256_file(path, follow_symlinks=False) != entry.sha256:
        raise CheckpointError(f"{path}: its contents have changed since it was written")
