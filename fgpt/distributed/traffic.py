"""Bytes that a rank sends, counted at torch's own doors, whoever calls them.

One operation on S bytes among N ranks counts as what each rank sends in a ring (Patarasuk & Yuan
2009): an all-reduce 2 (N - 1) / N S; an all-gather to S, a reduce-scatter of S, an all-to-all of S
half of that. A send counts as S, a broadcast as S on the rank that has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("tensor", "context", "pipe", "data")
FEW = 256
"""Bytes up to which a message in a group that is not FGPT's is an agreement: a norm, a flag."""
# operation -> (number of the argument whose bytes are S, what of S is sent is a multiple of
# (N - 1) / N: how many times)
_RING = {
    "allreduce_": (0, 2),
    "allreduce_coalesced_": (0, 2),
    "_allgather_base_": (0, 1),
    "allgather_": (0, 1),
    "allgather_into_tensor_coalesced_": (0, 1),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
    "alltoall_base_": (1, 1),
    "alltoall_": (1, 1),
}


class Traffic(TorchDispatchMode):
    """Counts what this rank sends inside; kind of group -> bytes.

    tensor, context   what the split layers say to each other; tensor ranks also share out what is
                      sent between stages, and put it together again
    data              among ranks that hold the same weights: gradients, ZeRO
    pipe              between stages: activations and their gradients, a tied head's gradient
    other             the rest: agreements of a few bytes
    """

    def __init__(self, named: Mapping[str, str], by_ranks: Mapping[tuple[int, ...], str]):
        """`named`: c10d group name -> kind. `by_ranks`: the ranks of any other group, in order ->
        kind; DeepSpeed makes such groups. `parallel.topology.count_traffic` knows both.
        """
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self._named, self._by_ranks = named, by_ranks

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count, then let it happen."""
        space, _, name = func._schema.name.partition("::")
        if space == "c10d":
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        if name in _RING:
            which, times = _RING[name]
            n = group.size()
            sent = times * (n - 1) * size_bytes(args[which]) // n
        elif name == "send":
            sent = size_bytes(args[0])
        elif name == "broadcast_":
            sent = size_bytes(args[0]) if group.rank() == args[2] else 0
        else:
            return
        self.bytes[self._kind(name, group, sent)] += sent

    def _kind(self, name: str, group: dist.ProcessGroup, sent: int) -> str:
        kind = self._named.get(group.group_name)
        if kind is not None:
            return kind
        if sent <= FEW:
            return "other"
        if name == "send":  # whatever the group: only stages send to one another
            return "pipe"
        return self._by_ranks.get(tuple(dist.get_process_group_ranks(group)), "other")


def size_bytes(tensors: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(size_bytes, tensors))
