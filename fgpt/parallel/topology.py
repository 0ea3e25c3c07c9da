"""The grid of ranks: its arithmetic, its process groups, and DeepSpeed's view of it (mpu).

Ranks are ordered (pipe, data, context, tensor). The tensor axis is innermost, because its ranks
communicate most and should be on one node. The groups of an axis are the ranks that differ in that
coordinate only; three more kinds span several axes:

    replica   data x context: same weights, so gradients are averaged over it
    model     pipe x tensor: together one copy of the weights, so the gradient norm sums over it
    stage     data x context x tensor: together all copies of a stage's weights
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from fgpt.config.batch import Batch

if TYPE_CHECKING:
    from fgpt.distributed.traffic import Traffic

AXES = ("pipe", "data", "context", "tensor")
GROUP_AXES: Mapping[str, tuple[str, ...]] = {
    **{axis: (axis,) for axis in AXES},
    "replica": ("data", "context"),
    "model": ("pipe", "tensor"),
    "stage": ("data", "context", "tensor"),
}
"""Kind of group -> the coordinates in which its ranks differ."""


class GridCoordinates(NamedTuple):
    """Coordinates of one rank."""

    pipe: int
    data: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Grid:
    """Number of ranks along each axis."""

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
        """Number of ranks."""
        return math.prod(self.shape)

    @property
    def replicas(self) -> int:
        """Number of ranks that hold the same weights: dp x cp."""
        return self.dp * self.cp

    def coordinates(self, rank: int) -> GridCoordinates:
        """Coordinates of a rank."""
        indices = []
        for size in reversed(self.shape):
            rank, index = divmod(rank, size)
            indices.append(index)
        return GridCoordinates(*reversed(indices))

    def rank(self, coordinates: GridCoordinates) -> int:
        """The rank at these coordinates."""
        rank = 0
        for index, size in zip(coordinates, self.shape, strict=True):
            rank = rank * size + index
        return rank

    def groups(self, kind: str) -> list[list[int]]:
        """Return all groups of a kind in `GROUP_AXES`, as lists of ranks in ascending order."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            named = self.coordinates(rank)._asdict()
            fixed = tuple(index for axis, index in named.items() if axis not in GROUP_AXES[kind])
            groups.setdefault(fixed, []).append(rank)
        return list(groups.values())


@dataclass(frozen=True)
class ProcessGroups:
    """Coordinates and process groups of one rank."""

    grid: Grid
    coordinates: GridCoordinates
    replica: dist.ProcessGroup
    model: dist.ProcessGroup
    tensor: dist.ProcessGroup | None = None
    """None if tp is 1."""
    context: dist.ProcessGroup | None = None
    """None if cp is 1."""
    stage: dist.ProcessGroup | None = None
    """None if it is `replica` or `tensor`, or not asked for."""


def make_process_groups(
    grid: Grid, rank: int, timeout: timedelta, *, with_stage: bool = False
) -> ProcessGroups:
    """Create FGPT's process groups, of kind stage only `with_stage`; all ranks call this together.

    Raises ValueError if the grid's size is not the number of ranks.
    """
    if grid.size != dist.get_world_size():
        raise ValueError(f"{grid} has {grid.size} ranks, {dist.get_world_size()} are running")

    def make(kind: str) -> dist.ProcessGroup:
        # every rank creates every group, in the same order, and keeps its own
        groups = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in grid.groups(kind)]
        return next(group for ranks, group in groups if rank in ranks)

    return ProcessGroups(
        grid,
        grid.coordinates(rank),
        replica=make("replica"),
        model=make("model"),
        tensor=make("tensor") if grid.tp > 1 else None,
        context=make("context") if grid.cp > 1 else None,
        stage=make("stage") if with_stage and grid.tp > 1 and grid.replicas > 1 else None,
    )


def count_traffic(groups: ProcessGroups) -> Traffic:
    """Count the bytes that this rank sends in FGPT's groups and in DeepSpeed's groups of the same
    ranks.
    """
    from fgpt.distributed.traffic import Traffic  # not needed in training

    # what crosses tensor ranks and replicas at once counts as the latter
    named = {"tensor": groups.tensor, "context": groups.context, "data": groups.stage}
    kinds = {"tensor": "tensor", "pipe": "pipe", "replica": "data"}
    return Traffic(
        {group.group_name: kind for kind, group in named.items() if group is not None},
        {
            ranks: label
            for kind, label in kinds.items()
            for group in groups.grid.groups(kind)
            # first and last stage share a tied head: DeepSpeed has a group for them
            for ranks in {tuple(group), (group[0], group[-1])}
            if len(group) > 1
        },
    )


@contextlib.contextmanager
def record_process_groups(timeout: timedelta) -> Iterator[list[dist.ProcessGroup]]:
    """Record every process group created inside, DeepSpeed's too, so that the caller can destroy
    them: each has threads and connections. Groups created without a timeout get this one.
    """
    recorded: list[dist.ProcessGroup] = []
    new_group = dist.new_group

    def recording_new_group(*args: Any, **kwargs: Any) -> Any:
        if len(args) < 2 and kwargs.get("timeout") is None:
            kwargs["timeout"] = timeout
        group = new_group(*args, **kwargs)
        if isinstance(group, dist.ProcessGroup):  # not the NON_GROUP_MEMBER constant
            recorded.append(group)
        return group

    dist.new_group = recording_new_group
    try:
        yield recorded
    finally:
        dist.new_group = new_group


class Mpu:
    """The grid in the interface of a Megatron "model parallel unit", which DeepSpeed reads.

    To DeepSpeed all ranks with the same weights are data-parallel, context-parallel ones included.
    """

    def __init__(self, groups: ProcessGroups):
        self._groups = groups

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks over which gradients are averaged and ZeRO shards."""
        return self._groups.replica

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._groups.replica)

    def get_data_parallel_world_size(self) -> int:
        return self._groups.grid.replicas

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._groups.replica)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that together hold one copy of the weights."""
        return self._groups.model

    def get_model_parallel_world_size(self) -> int:
        return self._groups.grid.pp * self._groups.grid.tp

    def get_model_parallel_rank(self) -> int:
        """Rank in the model-parallel group; DeepSpeed counts replicated parameters on rank 0."""
        return dist.get_rank(self._groups.model)

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks over which matrices are sharded; None if tp is 1."""
        return self._groups.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.grid.tp

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.coordinates.tensor
