"""Who is where: the grid of ranks as arithmetic, then its process groups, then DeepSpeed's mpu.

Ranks are laid out (pipe, data, context, tensor), the tensor axis innermost, because its ranks talk
most and should sit nearest. An axis' groups are the ranks that differ in that coordinate only; two
more cut along two axes:

    replica   data x context: hold the same weights, so their gradients are averaged
    model     pipe x tensor: together hold one copy of the weights, so they share a gradient norm
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from fgpt.config.batch import Batch
from fgpt.distributed.traffic import Traffic

AXES = ("pipe", "data", "context", "tensor")
CUTS: Mapping[str, tuple[str, ...]] = {
    **{axis: (axis,) for axis in AXES},
    "replica": ("data", "context"),
    "model": ("pipe", "tensor"),
}
"""Name of a kind of group -> the coordinates in which its ranks differ."""


class GridCoordinates(NamedTuple):
    """One rank's coordinates."""

    pipe: int
    data: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Grid:
    """The shape of the grid: how many ranks lie along each axis."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @classmethod
    def of(cls, batch: Batch) -> Grid:
        """The grid of a configuration."""
        return cls(batch.pp, batch.dp, batch.cp, batch.tp)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes in the order of `AXES`."""
        return (self.pp, self.dp, self.cp, self.tp)

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights: dp x cp."""
        return self.dp * self.cp

    def coordinates(self, rank: int) -> GridCoordinates:
        """Coordinates of a rank."""
        numbers = []
        for size in reversed(self.shape):
            rank, number = divmod(rank, size)
            numbers.append(number)
        return GridCoordinates(*reversed(numbers))

    def rank(self, coordinates: GridCoordinates) -> int:
        """The rank at these coordinates."""
        rank = 0
        for number, size in zip(coordinates, self.shape, strict=True):
            rank = rank * size + number
        return rank

    def groups(self, cut: str) -> list[list[int]]:
        """Every group of a kind named in `CUTS`, as lists of ranks; each rank is in one of them."""
        along = [axis in CUTS[cut] for axis in AXES]
        fixed = [range(1 if a else n) for a, n in zip(along, self.shape, strict=True)]
        free = [range(n if a else 1) for a, n in zip(along, self.shape, strict=True)]
        return [
            [
                self.rank(GridCoordinates(*(f + m for f, m in zip(base, move, strict=True))))
                for move in itertools.product(*free)
            ]
            for base in itertools.product(*fixed)
        ]


@dataclass(frozen=True)
class ProcessGroups:
    """One rank's coordinates and process groups."""

    grid: Grid
    coordinates: GridCoordinates
    replica: dist.ProcessGroup
    model: dist.ProcessGroup
    tensor: dist.ProcessGroup | None = None
    """None where tp is 1."""
    context: dist.ProcessGroup | None = None
    """None where cp is 1."""


def make_process_groups(grid: Grid, rank: int, timeout: timedelta) -> ProcessGroups:
    """The groups that FGPT talks in; all ranks call this together.

    Raises ValueError if the grid is not as large as the process group of all ranks.
    """
    if grid.size != dist.get_world_size():
        raise ValueError(f"{grid} has {grid.size} ranks, {dist.get_world_size()} are here")

    def mine(cut: str) -> dist.ProcessGroup:
        made = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in grid.groups(cut)]
        return next(group for ranks, group in made if rank in ranks)

    return ProcessGroups(
        grid,
        grid.coordinates(rank),
        replica=mine("replica"),
        model=mine("model"),
        tensor=mine("tensor") if grid.tp > 1 else None,
        context=mine("context") if grid.cp > 1 else None,
    )


def count_traffic(groups: ProcessGroups) -> Traffic:
    """Count what this rank sends in its groups, and in DeepSpeed's groups of the same ranks."""
    named = {"tensor": groups.tensor, "context": groups.context}
    kinds = {"tensor": "tensor", "pipe": "pipe", "replica": "data"}
    return Traffic(
        {group.group_name: kind for kind, group in named.items() if group is not None},
        {
            ranks: kind
            for cut, kind in kinds.items()
            for group in groups.grid.groups(cut)
            for ranks in {tuple(group), (group[0], group[-1])}  # both ends hold a tied head
            if len(group) > 1
        },
    )


@contextlib.contextmanager
def record_process_groups(timeout: timedelta) -> Iterator[list[dist.ProcessGroup]]:
    """Every group made inside, DeepSpeed's too, which get this timeout: it passes none of its own.

    Whoever has the list can destroy them: each group has threads and connections.
    """
    made: list[dist.ProcessGroup] = []
    new_group = dist.new_group

    def recorded(*args: Any, **kwargs: Any) -> Any:
        if len(args) < 2 and kwargs.get("timeout") is None:
            kwargs["timeout"] = timeout
        group = new_group(*args, **kwargs)
        if isinstance(group, dist.ProcessGroup):  # and not the mark of those who are not in it
            made.append(group)
        return group

    dist.new_group = recorded
    try:
        yield made
    finally:
        dist.new_group = new_group


class Mpu:
    """The grid as DeepSpeed asks for it ("model parallel unit").

    To DeepSpeed data parallel are all ranks with the same weights, context-parallel ones too.
    """

    def __init__(self, groups: ProcessGroups):
        self._groups = groups

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks over which gradients are averaged and ZeRO shards."""
        return self._groups.replica

    def get_data_parallel_group_ranks(self) -> list[int]:
        """The same as ranks."""
        return dist.get_process_group_ranks(self._groups.replica)

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self._groups.grid.replicas

    def get_data_parallel_rank(self) -> int:
        """This rank's number among them."""
        return dist.get_rank(self._groups.replica)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that together hold one copy of the weights."""
        return self._groups.model

    def get_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self._groups.grid.pp * self._groups.grid.tp

    def get_model_parallel_rank(self) -> int:
        """This rank's number among them; 0 counts what all of them hold."""
        return dist.get_rank(self._groups.model)

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks over which matrices are cut."""
        return self._groups.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self._groups.grid.tp

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank's number among them."""
        return self._groups.coordinates.tensor
