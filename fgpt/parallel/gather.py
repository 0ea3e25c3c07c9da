"""The whole model's tensors out of the parts that a layout has made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from fgpt.parallel.tensor.sharding import joined, shard_dim
from fgpt.parallel.topology import GridCoordinates, ProcessGroups


def gather_full_tensors(
    held: Mapping[str, Callable[[], Tensor]],
    shapes: Mapping[str, torch.Size],
    groups: ProcessGroups,
    like: Tensor,
) -> Iterator[tuple[str, Tensor]]:
    """(logical name, whole tensor) in the order of `shapes`; all ranks go through it in step.

    `held`: name -> what gives this rank's part, for what its stage holds; all are `like` that
    tensor in number format and device. One whole tensor is in memory at a time.
    """
    stages = _first_stages([name in held for name in shapes], groups, like.device)
    for (name, shape), stage in zip(shapes.items(), stages, strict=True):
        if name in held:  # then so it is on all tensor ranks of the stage
            whole = _joined(name, held[name](), shape, groups)
        else:
            whole = like.new_empty(shape)
        if groups.grid.pp > 1:
            place = groups.coordinates
            holder = groups.grid.rank(GridCoordinates(stage, place.data, place.context, 0))
            dist.broadcast(whole := whole.contiguous(), src=holder, group=groups.model)
        yield name, whole


def max_copy_differences(
    held: Mapping[str, Callable[[], Tensor]], groups: ProcessGroups
) -> dict[str, float]:
    """Logical name -> largest difference between the tensor ranks' copies of what is not cut."""
    found: dict[str, float] = {}
    for name, part in held.items():
        if groups.tensor is not None and shard_dim(name) is None:
            high, low = part().clone(), part().clone()
            dist.all_reduce(high, op=dist.ReduceOp.MAX, group=groups.tensor)
            dist.all_reduce(low, op=dist.ReduceOp.MIN, group=groups.tensor)
            found[name] = float((high - low).max())
    return found


def _first_stages(holds: list[bool], groups: ProcessGroups, device: torch.device) -> list[int]:
    """For each name the first stage that holds it."""
    if groups.grid.pp == 1:
        return [0] * len(holds)
    table = torch.zeros(groups.grid.pp, len(holds), dtype=torch.int32, device=device)
    table[groups.coordinates.pipe] = torch.tensor(holds, dtype=torch.int32, device=device)
    dist.all_reduce(table, group=groups.model)
    first: list[int] = table.gt(0).int().argmax(dim=0).tolist()
    return first


def _joined(name: str, part: Tensor, shape: torch.Size, groups: ProcessGroups) -> Tensor:
    if groups.tensor is None or shard_dim(name) is None:
        return part
    parts = [torch.empty_like(part) for _ in range(groups.grid.tp)]
    dist.all_gather(parts, part.contiguous(), group=groups.tensor)
    return joined(name, parts, shape)
