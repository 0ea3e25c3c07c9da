"""The two normalisations, by the names of the run file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, whose parameters' gradients add up in float32 in half precision on a CPU too.

    There torch 2.13's kernel adds them up in the precision of the weights: in bf16 the bias'
    gradient is off by 10 % after 2048 tokens.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if input.device.type == "cpu" and input.dtype in (torch.bfloat16, torch.float16):
            return _HalfLayerNorm.apply(input, self.weight, self.bias, self.eps)
        return super().forward(input)


class _HalfLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.biased = bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, mean, rstd, weight = ctx.saved_tensors
        towards_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grads[0], x, weight.shape, mean, rstd, weight, None, [True, False, False]
        )
        grad = grads[0].flatten(0, -2)  # (B T, D)
        rows = x.flatten(0, -2).float()
        centred = (rows - rows.mean(1, keepdim=True)).to(x.dtype)  # the saved mean is a rounded one
        # sum of grad (x - mean) rstd over tokens; a matrix product adds up in float32
        towards_weight = rstd.flatten().to(x.dtype) @ (grad * centred)
        return towards_x, towards_weight, grad.sum(0) if ctx.biased else None, None


def make_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over d_model elements.

    RMSNorm has no bias; LayerNorm's follows `config.bias`.
    """
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
