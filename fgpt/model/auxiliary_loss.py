"""Auxiliary losses: a block's second output, e.g. the load-balancing loss of an expert router.

No block has one yet: this is the seam at which experts will enter.

A block returns one tensor; recomputation and pipeline stages depend on it. So a block attaches its
auxiliary loss to that tensor, and the backward pass adds the gradient where the loss was computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AttachAuxiliaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: Tensor | float) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss) * scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_loss,) = ctx.saved_tensors
        return grads[0], grad_loss, None


def attach_auxiliary_loss(x: Tensor, loss: Tensor, scale: Tensor | float) -> Tensor:
    """Return x unchanged; its backward pass also backpropagates `scale * loss`.

    The same gradients as adding `scale * loss` to the total loss (Megatron-LM's
    MoEAuxLossAutoScaler). `loss`: float32 []. `scale`: the loss's weight times the factor that the
    engine applies to the main loss: loss scale / gradient accumulation steps.
    """
    attached: Tensor = _AttachAuxiliaryLoss.apply(x, loss, scale)
    return attached
