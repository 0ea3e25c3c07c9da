"""Counts the bytes each rank sends by intercepting c10d operations, DeepSpeed's included.

An operation on S bytes among N ranks counts as what each rank sends in a ring (Patarasuk & Yuan
2009): an all-reduce 2 (N - 1) / N S; an all-gather to S, a reduce-scatter of S, an all-to-all of S
half of that. A send counts as S; a broadcast as S, on its source rank; an all-to-all of unequal
parts as those for other ranks.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("tensor", "context", "pipe", "data")
SMALL_MESSAGE_BYTES = 256
"""Messages up to this size in groups that are not FGPT's are agreements: a norm, a flag."""
# operation -> (position of the argument of S bytes, k): a rank sends k (N - 1) / N S
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
    """A context that counts the bytes this rank sends, by kind of group.

    tensor, context   collectives of the parallel layers; "tensor" includes the scatter and gather
                      of activations between stages
    data              between ranks that hold the same weights: gradients, ZeRO
    pipe              between stages: activations, their gradients, a tied head's gradient
    other             the rest: agreements of a few bytes
    """

    def __init__(
        self, kind_by_name: Mapping[str, str], kind_by_ranks: Mapping[tuple[int, ...], str]
    ):
        """`kind_by_name`: c10d group name -> kind. `kind_by_ranks`: ranks of any other group, in
        order -> kind, for DeepSpeed's groups. See `parallel.topology.count_traffic`.
        """
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self._is_paused = False
        self._kind_by_name, self._kind_by_ranks = kind_by_name, kind_by_ranks

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count inside."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count a c10d operation and run it."""
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and not self._is_paused:
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        if name == "alltoall_base_" and args[4]:  # unequal parts
            parts = list(args[4])
            row = size_bytes(args[1]) // max(1, len(args[1]))
            sent = (sum(parts) - parts[group.rank()]) * row
        elif name in _RING:
            position, factor = _RING[name]
            n = group.size()
            sent = factor * (n - 1) * size_bytes(args[position]) // n
        elif name == "send":
            sent = size_bytes(args[0])
        elif name == "broadcast_":
            sent = size_bytes(args[0]) if group.rank() == args[2] else 0
        else:
            return
        self.bytes[self._kind(name, group, sent)] += sent

    def _kind(self, name: str, group: dist.ProcessGroup, sent: int) -> str:
        kind = self._kind_by_name.get(group.group_name)
        if kind is not None:
            return kind
        if sent <= SMALL_MESSAGE_BYTES:
            return "other"
        if name == "send":  # only stages send to one another
            return "pipe"
        ranks = tuple(dist.get_process_group_ranks(group))
        return self._kind_by_ranks.get(ranks, "other")


def size_bytes(tensors: Any) -> int:
    """Return the bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(size_bytes, tensors))
