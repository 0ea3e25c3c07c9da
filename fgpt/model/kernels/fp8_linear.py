"""Linear layers that multiply in 8 bits: twice bf16's rate on Hopper and Ada GPUs.

Values and weights are rounded to e4m3 (4 bits of exponent, 3 of fraction), gradients, which spread
wider, to e5m2; each tensor with a scale of its own, which takes its largest value to the format's
(Micikevicius et al. 2022, FP8 formats for deep learning). Sums are in float32. Nothing is
remembered from step to step, nothing is read on the host, and in compiled blocks the casts are part
of the kernels around them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in 8 bits; all sizes but x's leading ones are multiples of 16, in training the
    product of those, too. bf16 in and out.
    """
    y: Tensor = _Fp8.apply(x, weight, bias)
    return y


class _Fp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, scale = rounded(x.flatten(0, -2), VALUES)  # (N, I)
        ctx.save_for_backward(rows, scale, weight)  # half of bf16's memory
        y = _product(rows, scale, *rounded(weight, VALUES), x.dtype, bias)  # (N, O)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, scale, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)  # (N, O)
        rough, steep = rounded(flat, GRADIENTS)
        towards_x = towards_weight = None
        if wants_x:
            light, weight_scale = rounded(weight, VALUES)
            towards_x = _product(rough, steep, _turned(light), weight_scale, grad.dtype)  # (N, I)
            towards_x = towards_x.unflatten(0, grad.shape[:-1])
        if wants_weight:
            towards_weight = _product(_turned(rough), steep, _turned(rows), scale, grad.dtype)
        return towards_x, towards_weight, flat.sum(0) if wants_bias else None


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in this 8-bit format, and the float32 [] that it is to be multiplied by.

    A value that is not finite makes all of the result NaN: the step will be skipped.
    """
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _turned(x: Tensor) -> Tensor:
    """The transpose, in rows: both factors' inner dimension must be the contiguous one."""
    return x.t().contiguous()


def _product(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """a [M, K], b [N, K] -> a b^T [M, N] times both scales, plus bias."""
    y: Tensor = torch._scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale, bias=bias, out_dtype=dtype
    )
    return y
