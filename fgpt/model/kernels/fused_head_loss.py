"""Head and cross entropy in one: the loss without ever holding all logits.

The tokens go through head, loss and gradient in parts; the gradients towards the input and the
weight are ready when the forward pass ends, so that no logits are kept for a backward pass
(as in Liger-Kernel, Hsu et al. 2024). The slow twin is `next_token_loss(head(x), targets)`.

N tokens, C of a part, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fgpt.model.linear import Project

LOGITS = {"cpu": 2**21, "cuda": 2**27}
"""Logits of a part, by device: on a CPU they stay in its cache, on a GPU they fill it with work."""
SUMMED = 2**23
"""Gradients of logits that are held in bf16 on a CPU until they are multiplied by x: to add a
product of few tokens to the weight's float32 gradient takes longer than the product.
"""


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, project: Project = F.linear) -> Tensor:
    """Mean cross entropy [] in nats, float32: x [B, T, D], weight [V, D], targets int64 [B, T].

    All three products are `project`'s.
    """
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss: Tensor = _HeadLoss.apply(x.flatten(0, -2), weight, targets.flatten(), project, gradients)
    return loss


def part_size(weight: Tensor) -> int:
    """Tokens of a part, C: D / 2 at least, or the products are all reading of the weight."""
    n_rows, width = weight.shape
    return max(LOGITS.get(weight.device.type, 2**27) // n_rows, width // 2, 1)


def summed_size(weight: Tensor) -> int:
    """Tokens whose part of the weight's gradient is one product, some parts' together."""
    part = part_size(weight)
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return part
    return part * max(1, SUMMED // (part * len(weight)))


def _parts(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same `size` rows of each, one part after the other."""
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _losses(scores: Tensor, wanted: Tensor, probabilities: Tensor) -> Tensor:
    """[C, V], [C], softmax of the first [C, V] -> [C, 1].

    log(sum(exp(scores))) is the largest score less the logarithm of its probability, which is at
    least 1 / V: two passes instead of another over all exponentials.
    """
    largest = scores.amax(dim=1, keepdim=True) - probabilities.amax(dim=1, keepdim=True).log()
    return largest - scores.gather(1, wanted[:, None])


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, project: Project, gradients: bool
    ) -> Tensor:
        ctx.n_tokens, ctx.dtype = len(x), weight.dtype
        losses: list[Tensor] = []
        if not gradients:
            for rows, wanted in _parts(part_size(weight), x, targets):
                scores = project(rows, weight).float()
                losses.append(_losses(scores, wanted, scores.softmax(dim=1)))
            return torch.cat(losses).mean()
        towards_x = torch.empty_like(x)
        towards_weight = torch.zeros_like(weight, dtype=torch.float32)
        size = summed_size(weight)
        towards_logits = x.new_empty(min(size, len(x)), len(weight))
        for some, some_wanted, towards_some in _parts(size, x, targets, towards_x):
            towards = towards_logits[: len(some)]
            parts = _parts(part_size(weight), some, some_wanted, towards, towards_some)
            for rows, wanted, towards_scores, towards_rows in parts:
                scores = project(rows, weight).float()  # (C, V)
                probabilities = scores.softmax(dim=1)
                losses.append(_losses(scores, wanted, probabilities))
                probabilities.scatter_add_(1, wanted[:, None], -torch.ones_like(losses[-1]))
                towards_scores.copy_(probabilities)
                towards_rows.copy_(project(towards_scores, weight.t()))
            towards_weight += project(towards.t(), some.t())
        ctx.save_for_backward(towards_x, towards_weight)
        return torch.cat(losses).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        towards_x, towards_weight = ctx.saved_tensors
        share = grad / ctx.n_tokens
        towards = ((t.float() * share).to(ctx.dtype) for t in (towards_x, towards_weight))
        return *towards, None, None, None
