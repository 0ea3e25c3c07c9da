"""Cross entropy over a vocabulary that is split over ranks; the logits are never gathered.

What travels is three numbers per token: the largest logit, the sum of exponentials, and the
target's logit (Shoeybi et al. 2019, section 3, "parallel cross entropy").
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fgpt.parallel.tensor.collectives import Group, start_sum


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise IndexError for an id outside 0 .. vocab_size - 1, which every rank would take for
    another's and answer with zeros. On a GPU the failure comes when the kernels have run.
    """
    known = ((ids >= 0) & (ids < vocab_size)).all()
    if ids.device.type == "cuda":
        torch._assert_async(known)
    elif not known:
        low, high = int(ids.min()), int(ids.max())
        raise IndexError(f"token ids {low} to {high} do not lie in 0 .. {vocab_size - 1}")


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, group: Group) -> Tensor:
        scores = logits.float()  # (N, V / tp)
        top = scores.max(dim=1).values
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        scores = scores - top[:, None]
        mine, here = local_vocab_ids(targets, first, logits.shape[1])
        wanted = scores.gather(1, mine[:, None])[:, 0].masked_fill(~here, 0.0)
        exponentials = scores.exp()
        sums = start_sum(torch.stack([exponentials.sum(dim=1), wanted]), group).wait()  # (2, N)
        ctx.save_for_backward(exponentials.div_(sums[0, :, None]), mine, here)
        ctx.dtype = logits.dtype
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        probabilities, mine, here = ctx.saved_tensors
        gradient = probabilities.clone()  # (N, V / tp)
        rows = torch.arange(len(mine), device=mine.device)
        gradient[rows, mine] -= here.to(gradient.dtype)
        return (gradient * grads[0][:, None]).to(ctx.dtype), None, None, None


def local_vocab_ids(ids: Tensor, first: int, n_rows: int) -> tuple[Tensor, Tensor]:
    """ids [...] -> their numbers among the rows first .. first + n_rows - 1 (0 for other ranks'
    ids), and whether they are there.
    """
    mine = ids - first
    here = (mine >= 0) & (mine < n_rows)
    return mine.masked_fill(~here, 0), here


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, vocab_size: int, group: Group
) -> Tensor:
    """Mean cross entropy [] in nats, float32, equal on all ranks.

    logits [B, T, V'] of this rank's V' rows of the vocabulary, targets int64 [B, T]. Rows beyond
    `vocab_size` are padding: no probability is theirs. Raises IndexError for a target outside it.
    """
    check_ids(targets, vocab_size)
    n_rows = logits.shape[-1]
    first = group.rank() * n_rows
    flat = logits.flatten(0, 1)  # (N, V')
    if first + n_rows > vocab_size:
        padding = torch.arange(first, first + n_rows, device=flat.device) >= vocab_size
        flat = flat.masked_fill(padding, -math.inf)
    losses = _VocabParallelCrossEntropy.apply(flat, targets.flatten(), first, group)
    mean: Tensor = losses.mean()
    return mean
