"""The training state of a rank, by logical names: what a checkpoint saves and what it fills.

The state is a list of flat tensors: master weights and optimizer states. A flat tensor contains
fragments, each a range of one parameter's flattened shard (the whole parameter without tensor
parallelism), in any order and with padding between them:

    parameter              [        shard (rows of a tensor rank)       ]
    ZeRO partition                   [ fragment ]
    flat tensor            [ fragment of another parameter | fragment | padding ]

So every layout has one description, and no tensor is gathered to save or load it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgpt.optim.quantized import quantize

WEIGHT = "weight"
"""Name of the master weights among the states of a parameter."""
EMA = "ema"
"""Name of their moving average there."""


@dataclass(frozen=True)
class Shard:
    """The part of a logical tensor of which a rank has values: all of it, or a tensor rank's."""

    name: str
    """Logical name of the parameter."""
    shape: tuple[int, ...]
    """Of the full parameter."""
    offsets: tuple[int, ...]
    """Where the shard begins in the full parameter."""
    sizes: tuple[int, ...]
    """Of the shard, without padding."""


@dataclass(frozen=True)
class Fragment:
    """The elements [begin, end) of a flattened shard, at `offset` of a flat tensor."""

    shard: Shard
    begin: int
    end: int
    offset: int
    is_written: bool = True
    """Whether this rank saves it; another rank saves its copy otherwise."""


class Values(NamedTuple):
    """The values of a flat tensor; see `fgpt.optim.quantized` for states of 8 bits."""

    flat: Tensor
    """[N], to read or to fill in place."""
    scales: Tensor | None = None
    """To read 8-bit states: float32 [ceil(N / 256)]."""
    codebook: Tensor | None = None
    """To read 8-bit states: the values of the codes, float32 [256]."""
    bounds: Tensor | None = None
    """To fill 8-bit states: float32 [N], an upper bound of each value's magnitude."""


@dataclass(frozen=True)
class StateTensor:
    """One flat tensor of a rank's training state."""

    state: str
    """`WEIGHT`, or the optimizer's name of a state."""
    dtype: torch.dtype
    """Of the values that are read; values are filled in the dtype of the opened tensor."""
    fragments: Sequence[Fragment]
    open: Callable[[], AbstractContextManager[Values]]
    """Gives the values, which are valid inside; one tensor is open at a time."""


@dataclass(frozen=True)
class Progress:
    """The scalars of a training state; equal on every rank."""

    step: int
    """Optimizer steps since the start of the run, skipped ones included."""
    skipped_steps: int = 0
    """Number of skipped steps; the schedule is at step - skipped_steps."""
    updates: int = 0
    """Updates that the optimizer states have seen; Adam's bias correction depends on it."""
    loss_scale: dict[str, float] | None = None
    """State of fp16's dynamic loss scale by DeepSpeed's names."""


def state_to_read(states: Mapping[str, Any], name: str) -> Values:
    """Return one of an optimizer's states of a tensor, of any number of bits."""
    number = name.removeprefix("state")  # bitsandbytes: state1, absmax1, qmap1
    scales, codebook = states.get(f"absmax{number}"), states.get(f"qmap{number}")
    return Values(states[name].view(-1), scales, codebook)


@contextmanager
def state_to_fill(states: Mapping[str, Any], name: str) -> Iterator[Values]:
    """Like `state_to_read`, to fill inside; a state of 8 bits is quantized afterwards."""
    codes: Tensor = states[name].view(-1)
    if codes.dtype != torch.uint8:
        yield Values(codes)
        return
    number = name.removeprefix("state")
    filled, bounds = (torch.zeros_like(codes, dtype=torch.float32) for _ in range(2))
    yield Values(filled, bounds=bounds)
    new_codes, scales = quantize(filled, bounds, states[f"qmap{number}"])
    codes.copy_(new_codes)
    states[f"absmax{number}"].copy_(scales)


def assign_writers(sizes: Sequence[int], n_copies: int) -> list[int]:
    """Return for each tensor which of its equal copies is saved, so that all ranks save alike.

    `sizes`: elements of each tensor, equal on all ranks that hold the copies.
    """
    loads = [0] * n_copies
    writers = []
    for size in sizes:
        writer = loads.index(min(loads))
        loads[writer] += size
        writers.append(writer)
    return writers
