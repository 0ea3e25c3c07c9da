"""The mean of the weights of several checkpoints, a "soup" (Wortsman et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fgpt.checkpoint.identity import value_in
from fgpt.checkpoint.manifest import Manifest, Start
from fgpt.checkpoint.reader import CheckpointReader
from fgpt.checkpoint.weights_only import weight_tensor, write_weights
from fgpt.errors import CheckpointError


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
            values = value_in(theirs, name), value_in(ours, name)
            if name.startswith("model.") and values[0] != values[1]:
                raise CheckpointError(
                    f"{reader.path}: {name} is {values[0]!r}, and {values[1]!r} in"
                    " another checkpoint: only checkpoints of one model have a mean"
                )
    # 2. the means, complete under the final name or not at all
    tensors = [
        weight_tensor(name, record.shape, partial(_mean, readers, name))
        for name, record in newest.tensors.items()
    ]
    sources = [f"{reader.path} (step {reader.manifest.step})" for reader in readers]
    layout, origin = newest.history[-1].layout, f"mean of {', '.join(sources)}"
    start = Start(newest.step, newest.tokens_seen, layout, origin=origin)
    manifest = replace(newest, history=(*newest.history, start), valid_loss=None)
    return write_weights(root, manifest, tensors)


def _shape(manifest: Manifest, name: str) -> list[int] | str:
    record = manifest.tensors.get(name)
    return "absent" if record is None else list(record.shape)


def _mean(readers: Sequence[CheckpointReader], name: str) -> Tensor:
    """The mean of a weight."""
    total = torch.zeros(readers[0].manifest.tensors[name].shape, dtype=torch.float64)
    for reader in readers:
        total += reader.read(name)
    return total / len(readers)
