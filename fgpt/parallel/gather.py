"""Full tensors of the model, gathered from the shards of a layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from fgpt.parallel.tensor.sharding import shard_dim, unshard_parameter
from fgpt.parallel.topology import GridCoordinates, ProcessGroups


def gather_full_tensors(
    local: Mapping[str, Callable[[], Tensor]],
    shapes: Mapping[str, torch.Size],
    groups: ProcessGroups,
    like: Tensor,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (logical name, full tensor) in the order of `shapes`; all ranks iterate together.

    `local`: name -> function returning this rank's shard, for the parameters of its pipeline stage;
    dtype and device are those of `like`. One full tensor is in memory at a time.
    """
    # 1. agree on the first stage that holds each tensor (a tied weight is in two)
    stages = _first_stages([name in local for name in shapes], groups, like.device)
    for (name, shape), stage in zip(shapes.items(), stages, strict=True):
        # 2. concatenate the shards of the tensor ranks, all of which are in the same stage
        full = local[name]() if name in local else like.new_empty(shape)
        if name in local and groups.tensor is not None and shard_dim(name) is not None:
            shards = [torch.empty_like(full) for _ in range(groups.grid.tp)]
            dist.all_gather(shards, full.contiguous(), group=groups.tensor)
            full = unshard_parameter(name, shards, shape)
        # 3. broadcast from that stage to the others
        if groups.grid.pp > 1:
            here = groups.coordinates
            source = groups.grid.rank(GridCoordinates(stage, here.data, here.context, 0))
            dist.broadcast(full := full.contiguous(), src=source, group=groups.model)
        yield name, full


def max_copy_differences(
    local: Mapping[str, Callable[[], Tensor]], groups: ProcessGroups
) -> dict[str, float]:
    """Return logical name -> largest difference between the tensor ranks' copies of each replicated
    parameter; arguments as in `gather_full_tensors`.
    """
    differences: dict[str, float] = {}
    for name, tensor in local.items():
        if groups.tensor is not None and shard_dim(name) is None:
            high, low = tensor().clone(), tensor().clone()
            dist.all_reduce(high, op=dist.ReduceOp.MAX, group=groups.tensor)
            dist.all_reduce(low, op=dist.ReduceOp.MIN, group=groups.tensor)
            differences[name] = float((high - low).max())
    return differences


def _first_stages(is_local: list[bool], groups: ProcessGroups, device: torch.device) -> list[int]:
    """Return for each tensor the first pipeline stage where `is_local`."""
    if groups.grid.pp == 1:
        return [0] * len(is_local)
    table = torch.zeros(groups.grid.pp, len(is_local), dtype=torch.int32, device=device)
    table[groups.coordinates.pipe] = torch.tensor(is_local, dtype=torch.int32, device=device)
    dist.all_reduce(table, group=groups.model)
    first: list[int] = table.gt(0).int().argmax(dim=0).tolist()
    return first
