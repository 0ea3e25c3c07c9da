"""Cross entropy over a vocabulary that is sharded over ranks, without gathering the logits.

Three numbers per token are communicated: the largest logit, the sum of exponentials, and the
target's logit (Shoeybi et al. 2019, section 3, "parallel cross entropy").

N tokens, V' rows of the vocabulary on this rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fgpt.parallel.tensor.collectives import Group, start_all_reduce


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise IndexError for an id outside 0 .. vocab_size - 1, for which every rank would return
    zeros, as for another rank's ids. On a GPU the check fails asynchronously.
    """
    valid = ((ids >= 0) & (ids < vocab_size)).all()
    if ids.device.type == "cuda":
        torch._assert_async(valid)
    elif not valid:
        low, high = int(ids.min()), int(ids.max())
        raise IndexError(f"token ids {low} to {high} do not lie in 0 .. {vocab_size - 1}")


def local_vocab_ids(ids: Tensor, first: int, n_rows: int) -> tuple[Tensor, Tensor]:
    """Return each id's row among this rank's rows first .. first + n_rows - 1 (0 for ids of other
    ranks), and whether the id is local.
    """
    rows = ids - first
    is_local = (rows >= 0) & (rows < n_rows)
    return rows.masked_fill(~is_local, 0), is_local


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first: int, group: Group, z_loss: float
    ) -> Tensor:
        # 1. subtract the largest logit of all ranks, in float32
        top = logits.amax(dim=1).float()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        scores = logits - top[:, None]  # (N, V')
        # 2. the target's logit, 0 on ranks that do not hold its row
        rows, is_local = local_vocab_ids(targets, first, logits.shape[1])
        target_scores = scores.gather(1, rows[:, None])[:, 0].masked_fill(~is_local, 0.0)
        # 3. one all-reduce sums the exponentials and the target's logit over the ranks
        exponentials = scores.exp_()
        local_sums = torch.stack([exponentials.sum(dim=1), target_scores])  # (2, N)
        sums = start_all_reduce(local_sums, group).wait()
        # 4. save the softmax; loss = log(sum of exponentials) - target's logit
        log_sums = sums[0].log()
        probabilities = exponentials.div_(sums[0, :, None])
        ctx.save_for_backward(probabilities, rows, is_local, log_sums + top if z_loss > 0 else None)
        ctx.dtype, ctx.z_loss = logits.dtype, z_loss
        return log_sums - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # 5. gradient: softmax - one_hot(target), on this rank's rows; that of z log_sum^2 is
        # 2 z log_sum softmax
        probabilities, rows, is_local, log_sums = ctx.saved_tensors
        (grad,) = grads  # (N)
        factor = grad if log_sums is None else grad * (1 + 2 * ctx.z_loss * log_sums)
        grad_logits = probabilities * factor[:, None]  # (N, V')
        tokens = torch.arange(len(rows), device=rows.device)
        grad_logits[tokens, rows] -= grad.masked_fill(~is_local, 0.0)
        return grad_logits.to(ctx.dtype), None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, vocab_size: int, group: Group, z_loss: float = 0.0
) -> Tensor:
    """Return the mean cross entropy [] in nats, float32, equal on all ranks.

    logits [B, T, V'], targets int64 [B, T]. Rows beyond `vocab_size` are padding with probability
    0. `z_loss`: see `ModelConfig`; it adds to the gradient, not to the value, and communicates
    nothing. Raises IndexError for a target outside the vocabulary.
    """
    check_ids(targets, vocab_size)
    n_rows = logits.shape[-1]
    first = group.rank() * n_rows
    flat = logits.flatten(0, 1)  # (N, V')
    if first + n_rows > vocab_size:
        padding = torch.arange(first, first + n_rows, device=flat.device) >= vocab_size
        flat = flat.masked_fill(padding, -math.inf)
    losses = _VocabParallelCrossEntropy.apply(flat, targets.flatten(), first, group, z_loss)
    mean: Tensor = losses.mean()
    return mean
