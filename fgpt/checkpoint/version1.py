"""Checkpoints of format version 1: a manifest, and pickles of DeepSpeed or of the plain engine.

    mp_rank_MM_model_states.pt                          weights of the forward pass, counters
    layer_LL-model_TT-model_states.pt                   with a pipeline: weights of a layer
    zero_pp_rank_R_mp_rank_MM_optim_states.pt           master weights and optimizer states
    nvme_rank_R_group_G.pt                              those of a sub-group on NVMe
    plain_engine.pt                                     all of it

`fgpt checkpoint upgrade` reads them; nothing writes them any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fgpt.checkpoint.manifest import FILE, read_values
from fgpt.checkpoint.tensor_file import SavedFile
from fgpt.errors import CheckpointError, DataError
from fgpt.utils.files import open_path, open_regular
from fgpt.utils.json_dataclass import from_json

VERSION = 1


@dataclass(frozen=True)
class Manifest1:
    """The contents of manifest.json, version 1."""

    step: int
    samples_seen: int
    identity: dict[str, Any]
    """What a resume could not change, the layout included."""
    config: dict[str, Any]
    files: tuple[SavedFile, ...]
    version: int = VERSION
    is_permanent: bool = False
    valid_loss: float | None = None


def read_manifest1(directory: Path) -> Manifest1 | None:
    """Read manifest.json; None if it has another version.

    Raises CheckpointError if it is missing or damaged, OSError if it cannot be read.
    """
    values = read_values(directory)
    if values.get("version") != VERSION:
        return None
    try:
        return from_json(Manifest1, values, str(directory / FILE))
    except DataError as error:
        raise CheckpointError(f"{directory / FILE}: damaged: {error}") from error


class PickledFields:
    """Stands in for DeepSpeed's classes: has an instance's fields, runs none of their code."""

    def __init__(self, *_: Any):
        """An enum is pickled as a call with its value."""


_CLASSES = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)
"""The classes that DeepSpeed pickles into its optimizer files."""


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a file of tensors, numbers, text and containers; its tensors stay in a memory map.

    Raises CheckpointError if it is damaged or its pickle names any other code, which does not run.
    """
    allowed: list[Any] = [(PickledFields, name) for name in _CLASSES]
    try:
        with open_regular(path) as file, torch.serialization.safe_globals(allowed):
            opened = open_path(file, path)
            names = torch.serialization.get_unsafe_globals_in_checkpoint(opened)
            if names:
                names = sorted(names)
                raise CheckpointError(f"{path}: refused: it would run code ({', '.join(names)})")
            values = torch.load(opened, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises pickle, zip, runtime and OS errors for damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint file: {reason}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: has no dictionary")
    return values
