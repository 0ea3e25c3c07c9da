"""`sum_of_squares`, which every gradient norm uses."""

from __future__ import annotations

import math

import pytest
import torch

from fgpt.parallel.grad_norm import sum_of_squares


def test_squares_are_summed_exactly_on_a_cpu():
    parts = [torch.full((1000, 1000), 0.1), torch.full((7,), -2.0)]
    exact = 1e6 * float(torch.tensor(0.1)) ** 2 + 28.0
    assert float(sum_of_squares(parts, "cpu")) == pytest.approx(exact, rel=5e-7)
    assert float(sum_of_squares([], "cpu")) == 0.0
    assert math.isnan(sum_of_squares([torch.tensor([math.nan])], "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(shape, generator=generator).mul(10.0**power).to(dtype)
        for shape, power in (((3000, 701), -3), ((1024,), -6), ((5, 1, 7), 0), ((), -2), ((0,), 0))
    ]
    exact = sum(float(part.double().square().sum()) for part in parts)
    assert float(sum_of_squares(parts, "cpu")) == pytest.approx(exact, rel=5e-7)
    turned = [part.t() for part in parts if part.dim() == 2]  # not contiguous
    exact = float(turned[0].double().square().sum())
    assert float(sum_of_squares(turned, "cpu")) == pytest.approx(exact, rel=5e-7)


def test_infinities_propagate():
    part = torch.zeros(5000)
    part[77] = math.inf
    assert float(sum_of_squares([part], "cpu")) == math.inf
