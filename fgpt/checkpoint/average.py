"""The mean of the weights of several checkpoints, a "soup" (Wortsman et al. 2022)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fgpt.checkpoint.manifest import Manifest, Start
from fgpt.checkpoint.reader import CheckpointReader
from fgpt.checkpoint.tensor_file import TensorRecord, file_header, parts_of, stream, write_file
from fgpt.engine.state import WEIGHT, Fragment, Shard, StateTensor, Values
from fgpt.errors import CheckpointError
from fgpt.utils.files import sync_directory

FILE = "rank_00000.safetensors"


def average(readers: Sequence[CheckpointReader], root: Path) -> Path:
    """Write the mean of the weights into the new directory root/step_N, N the newest of them.

    One tensor is in memory at a time. The result has no optimizer states; a run resumed from it
    begins them afresh. Raises CheckpointError unless all have the same parameters, OSError.
    """
    # 1. the same model
    newest = max((reader.manifest for reader in readers), key=lambda manifest: manifest.step)
    for reader in readers:
        for name in newest.tensors.keys() | reader.manifest.tensors.keys():
            shapes = [_shape(manifest, name) for manifest in (newest, reader.manifest)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"{reader.path}: {name} is {shapes[1]}, and {shapes[0]} in another checkpoint:"
                    " only checkpoints of one model have a mean"
                )
        # options that keep the shapes: heads, position, norm_eps, ...
        theirs, ours = reader.manifest.identity, newest.identity
        for name in sorted(theirs.keys() | ours.keys()):
            if name.startswith("model.") and theirs.get(name) != ours.get(name):
                raise CheckpointError(
                    f"{reader.path}: {name} is {theirs.get(name)!r}, and {ours.get(name)!r} in"
                    " another checkpoint: only checkpoints of one model have a mean"
                )
    # 2. the means, complete under the final name or not at all
    final = root / f"step_{newest.step:08d}"
    partial_dir = final.with_name(final.name + ".tmp")
    partial_dir.mkdir(parents=True)
    tensors = [_mean(readers, name, record) for name, record in newest.tensors.items()]
    parts, records = parts_of(tensors)
    file = write_file(partial_dir / FILE, file_header(parts), stream(parts))
    sources = tuple(f"mean of: {reader.path} (step {reader.manifest.step})" for reader in readers)
    start = Start(newest.step, newest.tokens_seen, newest.history[-1].layout, sources)
    replace(
        newest,
        progress=replace(newest.progress, updates=0),
        files=(file,),
        tensors=records,
        history=(*newest.history, start),
        is_permanent=True,
        valid_loss=None,
    ).write(partial_dir)
    os.rename(partial_dir, final)
    sync_directory(root)
    return final


def _shape(manifest: Manifest, name: str) -> list[int] | str:
    record = manifest.tensors.get(name)
    return "absent" if record is None else list(record.shape)


def _mean(readers: Sequence[CheckpointReader], name: str, record: TensorRecord) -> StateTensor:
    """The mean of a weight, computed when it is written."""

    @contextmanager
    def open_mean(name: str) -> Iterator[Values]:
        total = torch.zeros(record.shape, dtype=torch.float64)
        for reader in readers:
            total += reader.read(name)
        yield Values((total / len(readers)).float().view(-1))

    shard = Shard(name, record.shape, (0,) * len(record.shape), record.shape)
    fragment = Fragment(shard, 0, math.prod(record.shape), 0)
    return StateTensor(WEIGHT, torch.float32, [fragment], partial(open_mean, name))
