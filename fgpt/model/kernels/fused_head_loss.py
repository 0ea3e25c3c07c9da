"""Head and cross entropy fused: the loss without materializing all logits.

Chunks of tokens go through head, loss and gradient; the gradients of input and weight are complete
when the forward pass ends, so no logits are saved for the backward pass (as in Liger-Kernel, Hsu et
al. 2024). The slow twin is `next_token_loss(head(x), targets, z_loss)`.

N tokens, C tokens per chunk, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fgpt.model.linear import LinearFunction

LOGITS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**27}
"""Logits per chunk, by device: on a CPU they stay in its cache, on a GPU they occupy all of it."""
BUFFERED_LOGIT_GRADIENTS = 2**23
"""Logit gradients that a CPU buffers in half precision before they are multiplied by x: adding a
product of few tokens to the weight's float32 gradient takes longer than the product itself.
"""


def fused_head_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    project: LinearFunction = F.linear,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the mean cross entropy [] in nats, float32.

    x [B, T, D], weight [V, D], targets int64 [B, T]; `project` computes all three products.
    `softcap`, `z_loss`: see `ModelConfig`; the z-loss adds to the gradients, not to the value.
    """
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss: Tensor = _FusedHeadLoss.apply(
        x.flatten(0, -2), weight, targets.flatten(), project, softcap, z_loss, needs_grad
    )
    return loss


def chunk_size(weight: Tensor) -> int:
    """Tokens per chunk, C: at least D / 2, or reading the weight would dominate the products."""
    n_vocab, width = weight.shape
    return max(LOGITS_PER_CHUNK.get(weight.device.type, 2**27) // n_vocab, width // 2, 1)


def _weight_grad_size(weight: Tensor) -> int:
    """Tokens per product of the weight's gradient: a multiple of the chunk size."""
    size = chunk_size(weight)
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return size
    return size * max(1, BUFFERED_LOGIT_GRADIENTS // (size * len(weight)))


def _chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same `size` rows of each tensor, chunk by chunk."""
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _log_sum_exp(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Logits [C, V] and their softmax [C, V] -> log(sum(exp(logits))) [C, 1].

    It is max(logits) - log(max(probabilities)), and the largest probability is at least 1 / V: two
    passes over [C, V] instead of another exponential of each element.
    """
    return logits.amax(dim=1, keepdim=True) - probabilities.amax(dim=1, keepdim=True).log()


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), in place; None: the logits."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        project: LinearFunction,
        softcap: float | None,
        z_loss: float,
        needs_grad: bool,
    ) -> Tensor:
        losses: list[Tensor] = []
        if not needs_grad:
            for x_chunk, target in _chunks(chunk_size(weight), x, targets):
                logits = _capped(project(x_chunk, weight).float(), softcap)  # (C, V)
                log_sums = _log_sum_exp(logits, logits.softmax(dim=1))
                losses.append(log_sums - logits.gather(1, target[:, None]))
            return torch.cat(losses).mean()
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        size = _weight_grad_size(weight)
        buffer = x.new_empty(min(size, len(x)), len(weight))  # logit gradients
        for x_part, targets_part, grad_x_part in _chunks(size, x, targets, grad_x):
            grad_logits = buffer[: len(x_part)]
            chunks = _chunks(chunk_size(weight), x_part, targets_part, grad_logits, grad_x_part)
            for x_chunk, target, grad_logits_chunk, grad_x_chunk in chunks:
                # 1. logits and losses of C tokens
                logits = _capped(project(x_chunk, weight).float(), softcap)  # (C, V)
                probabilities = logits.softmax(dim=1)
                log_sums = _log_sum_exp(logits, probabilities)  # (C, 1)
                losses.append(log_sums - logits.gather(1, target[:, None]))
                # 2. gradient of the logits: softmax - one_hot(target); that of z log_sum^2 is
                # 2 z log_sum softmax; through the cap, d capped / d logit = 1 - (capped / cap)^2
                if z_loss > 0:
                    probabilities *= 1 + 2 * z_loss * log_sums
                probabilities.scatter_add_(1, target[:, None], -torch.ones_like(log_sums))
                if softcap is not None:
                    probabilities *= 1 - logits.div_(softcap).square_()
                grad_logits_chunk.copy_(probabilities)
                # 3. gradient of the input: grad_logits weight
                grad_x_chunk.copy_(project(grad_logits_chunk, weight.t()))
            # 4. gradient of the weight: grad_logits^T x, summed in float32
            grad_weight += project(grad_logits.t(), x_part.t())
        ctx.n_tokens, ctx.dtype = len(x), weight.dtype
        ctx.save_for_backward(grad_x, grad_weight)
        return torch.cat(losses).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        # 5. scale by the loss's own gradient and the mean's 1 / N
        scale = grad / ctx.n_tokens
        gradients = ((g.float() * scale).to(ctx.dtype) for g in ctx.saved_tensors)
        return *gradients, None, None, None, None, None
