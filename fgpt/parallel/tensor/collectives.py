"""Autograd functions around collectives, in Megatron-LM's conjugate pairs.

                                                forward          backward
    copy_to_tensor_parallel_region              identity         all-reduce        (f)
    reduce_from_tensor_parallel_region          all-reduce       identity          (g)
    gather_from_sequence_parallel_region        all-gather       reduce-scatter    (g)
    reduce_scatter_to_sequence_parallel_region  reduce-scatter   all-gather        (g bar)
    exchange                                    all-to-all       all-to-all        (Ulysses)

The first two stand before a column-parallel and behind a row-parallel layer; under sequence
parallelism the next two take their places.

Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2; Jacobs et al. 2023, section 3.
Tokens are dimension 1 of [B, T, ...]. The group is an argument. Every rank of it must call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


class Pending:
    """A collective operation under way; `wait` for its result."""

    def __init__(self, work: dist.Work, result: Tensor, group_first: bool = False):
        self._work, self._result, self._group_first = work, result, group_first

    def wait(self) -> Tensor:
        """The result, on the current stream."""
        self._work.wait()
        if not self._group_first:
            return self._result
        return self._result.movedim(0, 1).flatten(1, 2)  # (N, B, T/N, ...) -> (B, T, ...)


def start_sum(x: Tensor, group: Group) -> Pending:
    """Sum over the ranks, in place."""
    work = dist.all_reduce(x, group=group, async_op=True)
    return Pending(work, x)


def start_gather(x: Tensor, group: Group) -> Pending:
    """[B, T/N, ...] of each of N ranks -> [B, T, ...]."""
    whole = x.new_empty(group.size() * len(x), *x.shape[1:])  # (N B, T/N, ...)
    work = dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=True)
    return Pending(work, whole.unflatten(0, (-1, len(x))), group_first=True)


def start_scatter(x: Tensor, group: Group) -> Pending:
    """Sum over the N ranks of [B, T, ...] -> this rank's tokens of it, [B, T/N, ...]."""
    parts = x.unflatten(1, (group.size(), -1)).movedim(1, 0).flatten(0, 1)  # (N B, T/N, ...)
    mine = torch.empty_like(parts[: len(x)])
    work = dist.reduce_scatter_tensor(mine, parts, group=group, async_op=True)
    return Pending(work, mine)


def exchanged(x: Tensor, split: int, join: int, group: Group) -> Tensor:
    """All-to-all: cut dimension `split` into N parts, one a rank; join theirs along `join`."""
    size = group.size()
    parts = x.unflatten(split, (size, -1)).movedim(split, 0).contiguous()  # (N, ...)
    theirs = torch.empty_like(parts)
    dist.all_to_all_single(theirs, parts, group=group)
    return theirs.movedim(0, join).flatten(join, join + 1)


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return start_sum(grads[0].clone(), ctx.group).wait(), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return start_sum(x.clone(), group).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _GatherFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return start_gather(x, group).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return start_scatter(grads[0], ctx.group).wait(), None


class _ReduceScatterToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return start_scatter(x, group).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return start_gather(grads[0], ctx.group).wait(), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, join: int, group: Group) -> Tensor:
        ctx.back = (join, split, group)
        return exchanged(x, split, join, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return exchanged(grads[0], *ctx.back), None, None, None


def copy_to_tensor_parallel_region(x: Tensor, group: Group) -> Tensor:
    """x as it is; its gradient is summed over the ranks."""
    return _CopyToRegion.apply(x, group)


def reduce_from_tensor_parallel_region(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks; the gradient, equal on all, is passed on as it is."""
    return _ReduceFromRegion.apply(x, group)


def gather_from_sequence_parallel_region(x: Tensor, group: Group) -> Tensor:
    """[B, T/N, D] -> [B, T, D]; the gradient is summed over the ranks and cut up again."""
    return _GatherFromRegion.apply(x, group)


def reduce_scatter_to_sequence_parallel_region(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of [B, T, D] -> this rank's [B, T/N, D]; the gradient is gathered."""
    return _ReduceScatterToRegion.apply(x, group)


def exchange(x: Tensor, split: int, join: int, group: Group) -> Tensor:
    """All-to-all of N ranks: dimension `split` is divided by N, dimension `join` grows by N."""
    return _Exchange.apply(x, split, join, group)
