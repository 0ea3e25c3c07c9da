"""8-bit products against float32 products of the same rounded values, and against bf16's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fgpt.model.kernels.fp8_linear import FORWARD_DTYPE, GRADIENT_DTYPE, fp8_linear, quantize

B, T, I, O = 3, 32, 48, 80  # noqa: E741


def leaves(scale: float = 1.0):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        x = (torch.randn(*shape, generator=generator) * scale).bfloat16()
        return x.requires_grad_()

    return drawn(B, T, I), drawn(O, I), drawn(O), drawn(B, T, O).detach()


def rounded(x, dtype):
    """x rounded to an 8-bit format with one scale, as float32."""
    scale = x.detach().float().abs().max() / torch.finfo(dtype).max
    return (x.detach().float() / scale).to(dtype).float() * scale


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
def test_products_of_rounded_values_are_exact(scale):
    x, weight, bias, grad = leaves(scale)
    y = fp8_linear(x, weight, bias)
    y.backward(grad)
    x8, weight8, grad8 = (
        rounded(t, f)
        for t, f in ((x, FORWARD_DTYPE), (weight, FORWARD_DTYPE), (grad, GRADIENT_DTYPE))
    )
    near = {"rtol": 2**-7, "atol": scale**2 * 1e-3}  # bf16's rounding of the result
    torch.testing.assert_close(y.float(), x8 @ weight8.t() + bias.float(), **near)
    torch.testing.assert_close(x.grad.float(), grad8 @ weight8, **near)
    rows = x8.flatten(0, 1)
    torch.testing.assert_close(weight.grad.float(), grad8.flatten(0, 1).t() @ rows, **near)
    torch.testing.assert_close(bias.grad.float(), grad.float().sum((0, 1)), **near)


def test_error_is_that_of_the_formats():
    x, weight, bias, grad = leaves()
    y, exact = fp8_linear(x, weight, bias), F.linear(x, weight, bias)
    y.backward(grad)
    gradients = [t.grad.clone() for t in (x, weight)]
    for t in (x, weight, bias):
        t.grad = None
    exact.backward(grad)
    assert 1e-3 < (y - exact).norm() / exact.norm() < 0.06  # e4m3 keeps 3 bits: 2^-4 at worst
    for actual, t in zip(gradients, (x, weight), strict=True):
        assert 1e-3 < (actual - t.grad).norm() / t.grad.norm() < 0.09  # e5m2 keeps 2


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_non_finite_values_become_nan(bad):
    x, weight, bias, grad = leaves()
    with torch.no_grad():
        x[0, 0, 0] = bad
    assert fp8_linear(x, weight, bias)[0, 0].isnan().all()
    grad[0, 0, 0] = bad
    x, weight, bias, _ = leaves()
    fp8_linear(x, weight, bias).backward(grad)
    assert x.grad[0, 0].isnan().all() and weight.grad[0].isnan().all()


def test_zeros_stay_zeros():
    eight, scale = quantize(torch.zeros(16, 16), FORWARD_DTYPE)
    assert not eight.float().any() and scale > 0


def test_one_token_and_no_gradient():
    x, weight, bias, _ = leaves()
    with torch.no_grad():
        torch.testing.assert_close(
            fp8_linear(x[:1, :1], weight, bias),
            fp8_linear(x[:1, :1].expand(1, 2, I), weight, bias)[:, :1],
        )
