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

Quantized = tuple[Tensor, Tensor]
"""8-bit values, and the float32 [] scale that they must be multiplied by."""


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in 8 bits, bf16 in and out.

    I and O must be multiples of 16; in training N, the product of x's leading sizes, too.
    """
    y: Tensor = _Fp8Linear.apply(x, weight, bias)
    return y


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x8 = quantize(x.flatten(0, -2), FORWARD_DTYPE)  # (N, I)
        ctx.save_for_backward(*x8, weight)  # x in half of the memory of bf16
        y = _scaled_matmul(x8, quantize(weight, FORWARD_DTYPE), x.dtype, bias)  # (N, O)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        *x8, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)  # (N, O)
        grad8 = quantize(flat, GRADIENT_DTYPE)
        grad_x = grad_weight = None
        if needs_x:
            weight8 = quantize(weight, FORWARD_DTYPE)
            grad_x = _scaled_matmul(grad8, _transpose(weight8), grad.dtype)  # (N, I)
            grad_x = grad_x.unflatten(0, grad.shape[:-1])
        if needs_weight:
            grad_weight = _scaled_matmul(_transpose(grad8), _transpose(x8), grad.dtype)  # (O, I)
        return grad_x, grad_weight, flat.sum(0) if needs_bias else None


def quantize(x: Tensor, dtype: torch.dtype) -> Quantized:
    """Round x to an 8-bit format. If x holds a non-finite value, products with the result are NaN,
    so the step is skipped.
    """
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _transpose(x: Quantized) -> Quantized:
    """The transpose, contiguous: the inner dimension of both factors must be the last in memory."""
    return x[0].t().contiguous(), x[1]


def _scaled_matmul(
    a: Quantized, b: Quantized, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """a [M, K], b [N, K] -> a b^T [M, N] times both scales, plus bias."""
    y: Tensor = torch._scaled_mm(
        a[0], b[0].t(), scale_a=a[1], scale_b=b[1], bias=bias, out_dtype=dtype
    )
    return y
