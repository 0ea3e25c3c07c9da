"""Autograd functions around collectives, in Megatron-LM's conjugate pairs.

                                                forward          backward
    copy_to_tensor_parallel_region              identity         all-reduce        (f)
    reduce_from_tensor_parallel_region          all-reduce       identity          (g)
    gather_from_sequence_parallel_region        all-gather       reduce-scatter    (g)
    reduce_scatter_to_sequence_parallel_region  reduce-scatter   all-gather        (g bar)
    all_to_all                                  all-to-all       all-to-all        (Ulysses)

The first two precede a column-parallel and follow a row-parallel layer; under sequence parallelism
the next two replace them.

Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2; Jacobs et al. 2023, section 3.
N ranks; tokens are dimension 1 of [B, T, ...]. All ranks of the group must call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


class AsyncCollective:
    """A collective in progress and its output."""

    def __init__(self, work: dist.Work, output: Tensor, group_first: bool = False):
        """`group_first`: the output is [N, B, T/N, ...]."""
        self._work, self._output, self._group_first = work, output, group_first

    def wait(self) -> Tensor:
        """Return the output; later operations on the current stream see it complete."""
        self._work.wait()
        if not self._group_first:
            return self._output
        return self._output.movedim(0, 1).flatten(1, 2)  # (N, B, T/N, ...) -> (B, T, ...)


def start_all_reduce(x: Tensor, group: Group) -> AsyncCollective:
    """Sum over the ranks, in place."""
    return AsyncCollective(dist.all_reduce(x, group=group, async_op=True), x)


def start_all_gather(x: Tensor, group: Group) -> AsyncCollective:
    """[B, T/N, ...] on each rank -> [B, T, ...]."""
    output = x.new_empty(group.size() * len(x), *x.shape[1:])  # (N B, T/N, ...)
    work = dist.all_gather_into_tensor(output, x.contiguous(), group=group, async_op=True)
    return AsyncCollective(work, output.unflatten(0, (-1, len(x))), group_first=True)


def start_reduce_scatter(x: Tensor, group: Group) -> AsyncCollective:
    """[B, T, ...] on each rank -> this rank's tokens of the sum, [B, T/N, ...]."""
    shards = x.unflatten(1, (group.size(), -1)).movedim(1, 0).flatten(0, 1)  # (N B, T/N, ...)
    output = torch.empty_like(shards[: len(x)])
    work = dist.reduce_scatter_tensor(output, shards, group=group, async_op=True)
    return AsyncCollective(work, output)


def _identity(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    return start_all_reduce(x.clone(), group).wait()


def _all_gather(x: Tensor, group: Group) -> Tensor:
    return start_all_gather(x, group).wait()


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    return start_reduce_scatter(x, group).wait()


class _ConjugatePair(torch.autograd.Function):
    """One operation in the forward pass, its conjugate on the gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, operation: Any, conjugate: Any) -> Tensor:
        ctx.group, ctx.conjugate = group, conjugate
        return operation(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.conjugate(grads[0], ctx.group), None, None, None


def copy_to_tensor_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Return x; its gradient is summed over the ranks."""
    return _ConjugatePair.apply(x, group, _identity, _all_reduce)


def reduce_from_tensor_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Return the sum over the ranks; the gradient, equal on all ranks, passes unchanged."""
    return _ConjugatePair.apply(x, group, _all_reduce, _identity)


def gather_from_sequence_parallel_region(x: Tensor, group: Group) -> Tensor:
    """[B, T/N, D] -> [B, T, D]; the gradient is summed over the ranks and scattered."""
    return _ConjugatePair.apply(x, group, _all_gather, _reduce_scatter)


def reduce_scatter_to_sequence_parallel_region(x: Tensor, group: Group) -> Tensor:
    """[B, T, D] -> this rank's tokens of the sum, [B, T/N, D]; the gradient is gathered."""
    return _ConjugatePair.apply(x, group, _reduce_scatter, _all_gather)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split_dim: int, concat_dim: int, group: Group) -> Tensor:
        ctx.inverse = (concat_dim, split_dim, group)
        # 1. split `split_dim` into N shards, one per rank
        size = group.size()
        shards = x.unflatten(split_dim, (size, -1)).movedim(split_dim, 0).contiguous()  # (N, ...)
        # 2. send shard r to rank r, receive one shard from each rank
        received = torch.empty_like(shards)
        dist.all_to_all_single(received, shards, group=group)
        # 3. concatenate the received shards along `concat_dim`
        return received.movedim(0, concat_dim).flatten(concat_dim, concat_dim + 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _AllToAll.apply(grads[0], *ctx.inverse), None, None, None


def all_to_all(x: Tensor, split_dim: int, concat_dim: int, group: Group) -> Tensor:
    """Divide dimension `split_dim` by N and multiply dimension `concat_dim` by N."""
    return _AllToAll.apply(x, split_dim, concat_dim, group)
