"""Two checkpoints, tensor by tensor: which differ, and by how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fgpt.checkpoint.reader import CheckpointReader


@dataclass(frozen=True)
class TensorDifference:
    """A state of a parameter that is not the same in both checkpoints."""

    name: str
    state: str
    """`weight`, or an optimizer state."""
    largest: float | None
    """Largest absolute difference of an element; None: only one has it, or the shapes differ."""
    relative: float | None
    """Norm of the difference divided by the norm of the first."""
    what: str
    """What is different, if `largest` is None."""


def differences(a: CheckpointReader, b: CheckpointReader) -> Iterator[TensorDifference | None]:
    """Yield each state of each parameter: None where it is equal bit for bit."""
    first, second = a.manifest.tensors, b.manifest.tensors
    for name in sorted(first.keys() | second.keys()):
        states = [t[name].states if name in t else {} for t in (first, second)]
        for state in sorted(states[0].keys() | states[1].keys(), reverse=True):  # weight first
            if state not in states[0] or state not in states[1]:
                where = "first" if state in states[0] else "second"
                yield TensorDifference(name, state, None, None, f"only in the {where}")
            elif first[name].shape != second[name].shape:
                shapes = f"{list(first[name].shape)} and {list(second[name].shape)}"
                yield TensorDifference(name, state, None, None, shapes)
            else:
                yield _difference(name, state, a.read(name, state), b.read(name, state))


def _difference(name: str, state: str, x: Tensor, y: Tensor) -> TensorDifference | None:
    if x.dtype == y.dtype and torch.equal(x, y):
        return None
    x, y = x.double(), y.double()
    change = (y - x).abs()
    norm = float(x.norm())
    relative = float(change.norm()) / norm if norm > 0 else float("inf")
    return TensorDifference(name, state, float(change.max()), relative, "")
