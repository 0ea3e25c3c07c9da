"""Checkpoints without optimizer states: means, and weights of other programs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fgpt.checkpoint.manifest import Manifest
from fgpt.checkpoint.tensor_file import file_header, parts_of, stream, write_file
from fgpt.engine.state import WEIGHT, Fragment, Shard, StateTensor, Values
from fgpt.utils.files import sync_directory

FILE = "rank_00000.safetensors"


def weight_tensor(name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> StateTensor:
    """Return a weight, which `read` returns in this shape when it is written."""

    @contextmanager
    def open_weight() -> Iterator[Values]:
        yield Values(read().float().reshape(-1))

    shard = Shard(name, shape, (0,) * len(shape), shape)
    return StateTensor(
        WEIGHT, torch.float32, [Fragment(shard, 0, math.prod(shape), 0)], open_weight
    )


def write_weights(root: Path, manifest: Manifest, tensors: Sequence[StateTensor]) -> Path:
    """Write the new directory root/step_N, N the manifest's step; it is complete or not there.

    The manifest's files and tensors are replaced. One tensor is in memory at a time. Raises
    OSError.
    """
    final = root / f"step_{manifest.step:08d}"
    partial_dir = final.with_name(final.name + ".tmp")
    partial_dir.mkdir(parents=True)
    parts, records = parts_of(tensors)
    file = write_file(partial_dir / FILE, file_header(parts), stream(parts))
    replace(
        manifest,
        progress=replace(manifest.progress, updates=0),
        files=(file,),
        tensors=records,
        is_permanent=True,
    ).write(partial_dir)
    os.rename(partial_dir, final)
    sync_directory(root)
    return final
