"""Head and cross entropy in one: the loss without ever holding all logits.

The tokens go through head, loss and gradient in parts; the gradients towards the input and the
weight are ready when the forward pass ends, so that no logits are kept for a backward pass
(as in Liger-Kernel, Hsu et al. 2024). The slow twin is `next_token_loss(head(x), targets)`.

N tokens, C of a part, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fgpt.model.linear import Project

LOGITS = {"cpu": 2**21, "cuda": 2**27}
"""Logits of a part, by device: on a CPU they stay in its cache, on a GPU they fill it with work."""


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, project: Project = F.linear) -> Tensor:
    """Mean cross entropy [] in nats, float32: x [B, T, D], weight [V, D], targets int64 [B, T].

    All three products are `project`'s.
    """
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss: Tensor = _HeadLoss.apply(x.flatten(0, -2), weight, targets.flatten(), project, gradients)
    return loss


def part_size(weight: Tensor) -> int:
    """Tokens of a part, C.

    The weight's gradient is read and written once for each part: with D / 2 tokens or more that
    takes less time than their logits.
    """
    n_rows, width = weight.shape
    return max(LOGITS.get(weight.device.type, 2**27) // n_rows, width // 2, 1)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, project: Project, gradients: bool
    ) -> Tensor:
        ctx.n_tokens, ctx.dtype = len(x), weight.dtype
        losses = []
        towards_x = torch.empty_like(x) if gradients else x
        towards_weight = torch.zeros_like(weight, dtype=torch.float32) if gradients else weight
        size = part_size(weight)
        parts = zip(x.split(size), targets.split(size), towards_x.split(size), strict=True)
        for rows, wanted, towards_rows in parts:
            scores = project(rows, weight).float().log_softmax(dim=1)  # (C, V)
            chosen = wanted[:, None]
            losses.append(-scores.gather(1, chosen))
            if gradients:
                scores.exp_().scatter_add_(1, chosen, -torch.ones_like(losses[-1]))
                towards_logits = scores.to(x.dtype)
                towards_rows.copy_(project(towards_logits, weight.t()))
                towards_weight += project(towards_logits.t(), rows.t())
        if gradients:
            ctx.save_for_backward(towards_x, towards_weight)
        return torch.cat(losses).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        towards_x, towards_weight = ctx.saved_tensors
        share = grad / ctx.n_tokens
        towards = ((t.float() * share).to(ctx.dtype) for t in (towards_x, towards_weight))
        return *towards, None, None, None
