"""The fused head's loss between its matrix products, compiled: it reads the logits twice and writes
their gradients once, if the compiler makes one kernel of it, as it does of a softmax.

`eager_chunk_loss`, the slow twin, moves 28 bytes per bf16 logit, this one then 6. It is not
liger-kernel's fused linear cross entropy, because that decides how the products are cut, too: into
chunks of about N D / V tokens (512 for GPT-2 small), and each adds to the float32 gradient,
0.3 GB read and written 64 times per micro-batch of 32 x 1024 tokens. FGPT's chunks are five times
as large, its products are replaceable (`LinearFunction`), and cap and z-loss cost nothing.

C tokens per chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fgpt.model.kernels.compiled_part import compile_part
from fgpt.model.kernels.fused_head_loss import ChunkLoss, eager_chunk_loss

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest difference from `eager_chunk_loss`, relative to the largest loss and gradient: a rounding
of the gradients, where sums in another order cross its border."""


def one_pass_chunk_loss(
    logits: Tensor,
    targets: Tensor,
    gradients: Tensor | None,
    softcap: float | None,
    z_loss: float,
) -> Tensor:
    """A `ChunkLoss` to be compiled: without a compiler it would hold several float32 [C, V]."""
    scores = logits.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # 1. losses; the compiler computes the largest score and the sum in one pass
    largest = scores.amax(dim=1, keepdim=True)
    total = (scores - largest).exp().sum(dim=1, keepdim=True)  # (C, 1)
    log_sums = total.log() + largest
    losses = log_sums - scores.gather(1, targets)
    if gradients is None:
        return losses
    # 2. gradients, as in `eager_chunk_loss`; a comparison instead of a scatter, which would need
    # all probabilities in memory
    gradient = (scores - largest).exp() / total
    if z_loss > 0:
        gradient = gradient * (1 + 2 * z_loss * log_sums)
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets  # (C, V)
    gradient = gradient - is_target.float()
    if softcap is not None:
        gradient = gradient * (1 - (scores / softcap).square())
    gradients.copy_(gradient)
    return losses


def compile_chunk_loss(
    n_tokens: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> ChunkLoss | None:
    """Return the compiled loss, or None, with a warning, where it does not agree with
    `eager_chunk_loss` on random logits [n_tokens, vocab_size], the shape of training's chunks.
    """

    def outputs(loss: ChunkLoss) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(1)
        shape = (n_tokens, vocab_size)
        logits = torch.randn(shape, generator=generator, device=device, dtype=dtype) * 3
        targets = torch.randint(vocab_size, (n_tokens, 1), generator=generator, device=device)
        gradients = torch.full_like(logits, torch.nan)
        return loss(logits, targets, gradients, softcap, z_loss), gradients

    tolerance = TOLERANCES[dtype]
    return compile_part(
        one_pass_chunk_loss, eager_chunk_loss, outputs, tolerance, "the head's loss"
    )
