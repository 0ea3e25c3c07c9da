"""Packed products against `F.linear`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fgpt.model.kernels.packed_linear import PackedProduct, packs


@pytest.mark.parametrize("rows", [(1, 1), (1, 9), (8, 1), (3, 40)])
@pytest.mark.parametrize("size", [(96, 33), (33, 96), (40, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_linear(dtype, size, rows):
    if not packs(dtype):
        pytest.skip("this CPU does not pack it")
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (size, (*rows, size[1]), size[:1])
    )
    product, tolerance = PackedProduct(weight), 1e-5 if dtype == torch.float32 else 2e-2
    for b in (bias, None):
        wanted = F.linear(x.double(), weight.double(), None if b is None else b.double())
        got = product(x, torch.empty(0), b)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * 4)
