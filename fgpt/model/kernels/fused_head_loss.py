"""Head and cross entropy fused: the loss without materializing all logits.

Chunks of tokens go through head, loss and gradient; the gradients of input and weight are complete
when the forward pass ends, so no logits are saved for the backward pass (as in Liger-Kernel, Hsu et
al. 2024). The slow twin is `next_token_loss(head(x), targets, z_loss)`.

N tokens, C tokens per chunk, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fgpt.model.linear import LinearFunction

ChunkLoss = Callable[..., Tensor]
"""(logits [C, V], targets int64 [C, 1], gradients [C, V] or None, softcap, z_loss) -> loss of each
token [C, 1], float32; writes the gradient of each token's loss into `gradients`, and may overwrite
`logits`."""

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
    chunk_loss: ChunkLoss | None = None,
) -> Tensor:
    """Return the mean cross entropy [] in nats, float32.

    x [B, T, D], weight [V, D], targets int64 [B, T]; `project` computes all three products.
    `softcap`, `z_loss`: see `ModelConfig`; the z-loss adds to the gradients, not to the value.
    `chunk_loss`: computes all between the products; None: `eager_chunk_loss`.
    """
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss_of_logits = partial(chunk_loss or eager_chunk_loss, softcap=softcap, z_loss=z_loss)
    loss: Tensor = _FusedHeadLoss.apply(
        x.flatten(0, -2), weight, targets.flatten(), project, loss_of_logits, needs_grad
    )
    return loss


def chunk_size(n_vocab: int, width: int, device: str) -> int:
    """Tokens per chunk, C: at least D / 2, or reading the weight would dominate the products."""
    return max(LOGITS_PER_CHUNK.get(device, 2**27) // n_vocab, width // 2, 1)


def _chunk_size(weight: Tensor) -> int:
    n_vocab, width = weight.shape
    return chunk_size(n_vocab, width, weight.device.type)


def _weight_grad_size(weight: Tensor) -> int:
    """Tokens per product of the weight's gradient: a multiple of the chunk size."""
    size = _chunk_size(weight)
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


def eager_chunk_loss(
    logits: Tensor,
    targets: Tensor,
    gradients: Tensor | None,
    softcap: float | None,
    z_loss: float,
) -> Tensor:
    """A `ChunkLoss` that runs everywhere; about six passes over [C, V] in float32."""
    # 1. losses
    logits = _capped(logits.float(), softcap)  # (C, V)
    probabilities = logits.softmax(dim=1)
    log_sums = _log_sum_exp(logits, probabilities)  # (C, 1)
    losses = log_sums - logits.gather(1, targets)
    if gradients is None:
        return losses
    # 2. gradient of the logits: softmax - one_hot(target); that of z log_sum^2 is
    # 2 z log_sum softmax; through the cap, d capped / d logit = 1 - (capped / cap)^2
    if z_loss > 0:
        probabilities *= 1 + 2 * z_loss * log_sums
    probabilities.scatter_add_(1, targets, -torch.ones_like(log_sums))
    if softcap is not None:
        probabilities *= 1 - logits.div_(softcap).square_()
    gradients.copy_(probabilities)
    return losses


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        project: LinearFunction,
        chunk_loss: ChunkLoss,
        needs_grad: bool,
    ) -> Tensor:
        losses: list[Tensor] = []
        if not needs_grad:
            for x_chunk, target in _chunks(_chunk_size(weight), x, targets):
                losses.append(chunk_loss(project(x_chunk, weight), target[:, None], None))
            return torch.cat(losses).mean()
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        size = _weight_grad_size(weight)
        buffer = x.new_empty(min(size, len(x)), len(weight))  # logit gradients
        for x_part, targets_part, grad_x_part in _chunks(size, x, targets, grad_x):
            grad_logits = buffer[: len(x_part)]
            chunks = _chunks(_chunk_size(weight), x_part, targets_part, grad_logits, grad_x_part)
            for x_chunk, target, grad_logits_chunk, grad_x_chunk in chunks:
                # 1. logits of C tokens, their losses and gradients
                logits = project(x_chunk, weight)  # (C, V)
                losses.append(chunk_loss(logits, target[:, None], grad_logits_chunk))
                # 2. gradient of the input: grad_logits weight
                grad_x_chunk.copy_(project(grad_logits_chunk, weight.t()))
            # 3. gradient of the weight: grad_logits^T x, summed in float32
            grad_weight += project(grad_logits.t(), x_part.t())
        ctx.n_tokens, ctx.dtype = len(x), weight.dtype
        ctx.save_for_backward(grad_x, grad_weight)
        return torch.cat(losses).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        # 4. scale by the loss's own gradient and the mean's 1 / N
        scale = grad / ctx.n_tokens
        gradients = ((g.float() * scale).to(ctx.dtype) for g in ctx.saved_tensors)
        return *gradients, None, None, None, None
