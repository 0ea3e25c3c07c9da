"""Linear layers that multiply in 8 bits: twice bf16's rate on Hopper and Ada GPUs.

Activations and weights are rounded to e4m3 (4 exponent bits, 3 mantissa bits), gradients, whose
range is wider, to e5m2. Each tensor has its own scale, which maps its largest value to the format's
(dynamic scaling; Micikevicius et al. 2022, FP8 formats for deep learning). Sums are in float32.
There is no state between steps and no synchronization with the device; compiled blocks fuse the
casts with the operations around them. The slow twin is `F.linear` on the rounded values in float32.

N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FORWARD_DTYPE, GRADIENT_DTYPE = torch.float8_e4m3fn, torch.float8_e5m2


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in 8 bits, bf16 in and out.

    I and O must be multiples of 16; in training N, the product of x's leading sizes, too.
    """
    y: Tensor = _Fp8Linear.apply(x, weight, bias)
    return y


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x8, x_scale = quantize(x.flatten(0, -2), FORWARD_DTYPE)  # (N, I)
        ctx.save_for_backward(x8, x_scale, weight)  # half of the memory of bf16
        y = _scaled_matmul(x8, x_scale, *quantize(weight, FORWARD_DTYPE), x.dtype, bias)  # (N, O)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x8, x_scale, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)  # (N, O)
        grad8, grad_scale = quantize(flat, GRADIENT_DTYPE)
        grad_x = grad_weight = None
        if needs_x:
            weight8, weight_scale = quantize(weight, FORWARD_DTYPE)
            grad_x = _scaled_matmul(
                grad8, grad_scale, _transpose(weight8), weight_scale, grad.dtype
            )  # (N, I)
            grad_x = grad_x.unflatten(0, grad.shape[:-1])
        if needs_weight:
            grad_weight = _scaled_matmul(
                _transpose(grad8), grad_scale, _transpose(x8), x_scale, grad.dtype
            )  # (O, I)
        return grad_x, grad_weight, flat.sum(0) if needs_bias else None


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x in an 8-bit format and the float32 [] scale that it must be multiplied by.

    If x holds a non-finite value, products with the result are NaN, so the step is skipped.
    """
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _transpose(x: Tensor) -> Tensor:
    """The transpose, contiguous: the inner dimension of both factors must be the last in memory."""
    return x.t().contiguous()


def _scaled_matmul(
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
