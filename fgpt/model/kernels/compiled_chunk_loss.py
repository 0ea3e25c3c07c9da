"""The fused head's loss between its matrix products, compiled: one kernel reads the logits twice
and writes their gradients once.

`eager_chunk_loss`, the slow twin, moves 28 bytes per bf16 logit, this one 6. Not liger-kernel's
fused linear cross entropy, because that one also decides how the products are cut: it takes chunks
of about N D / V tokens (512 for GPT-2 small), and each adds to the weight's float32 gradient, 0.3
GB read and written 64 times per micro-batch of 32 x 1024 tokens. FGPT's chunks are five times as
large, its products are replaceable (`LinearFunction`), and the cap and the z-loss come for free.

C tokens per chunk, V vocabulary.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fgpt.model.kernels.fused_head_loss import ChunkLoss, eager_chunk_loss

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest difference from `eager_chunk_loss`: of the losses in nats, of the gradients, which lie
between -1 and 1, relative to the largest."""


def one_pass_chunk_loss(
    logits: Tensor,
    targets: Tensor,
    gradients: Tensor | None,
    softcap: float | None,
    z_loss: float,
) -> Tensor:
    """A `ChunkLoss` to be compiled: it holds no [C, V] tensor that is not an argument then."""
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
    """Return the compiled loss, or None, with a warning, where the compiler fails or its code
    differs from `eager_chunk_loss` on random logits [n_tokens, vocab_size].

    Call it before training, with the shape of its chunks: so the compiler runs here, and not in the
    first step.
    """
    compiled: ChunkLoss = torch.compile(one_pass_chunk_loss)
    generator = torch.Generator(device).manual_seed(1)
    found = []
    try:
        shape = (n_tokens, vocab_size)
        logits = torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(3)
        targets = torch.randint(vocab_size, (n_tokens, 1), generator=generator, device=device)
        for loss in (compiled, eager_chunk_loss):
            gradients = torch.full_like(logits, torch.nan)
            losses = loss(logits, targets, gradients, softcap, z_loss)
            found.append((losses, gradients))
        (losses, gradients), (wanted_losses, wanted_gradients) = found
        differences = {
            "losses": largest_difference(losses, wanted_losses),
            "gradients": largest_difference(gradients, wanted_gradients)
            / float(wanted_gradients.abs().max()),
        }
        # no `max`: it loses a NaN
        wrong = [
            f"{name} by {d:.1e}" for name, d in differences.items() if not d <= TOLERANCES[dtype]
        ]
        reason = f"the compiled one differs in its {' and '.join(wrong)}" if wrong else ""
    except Exception as error:  # the compiler's are of any kind
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if reason:
        warnings.warn(f"the head's loss takes a slower path: {reason}", stacklevel=2)
        return None
    return compiled


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Of two tensors of one shape, NaN if one has a NaN."""
    return float((a.float() - b.float()).abs().max())
