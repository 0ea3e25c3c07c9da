"""Packed products against `F.linear`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fgpt.model.kernels.packed_linear import PackedProduct, pack_weights, packs
from fgpt.model.linear import Linear
from tests.model.test_gpt import TINY, built, tokens


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


@torch.no_grad()
def test_a_packed_model_gives_the_same_logits_and_drops_the_weights():
    if not packs(torch.float32):
        pytest.skip("this CPU does not pack float32")
    model, ids = built(TINY).eval(), tokens(TINY)
    wanted = model(ids)
    pack_weights(model)
    torch.testing.assert_close(model(ids), wanted, rtol=1e-4, atol=1e-5)
    assert all(m.weight.numel() == 0 for m in model.modules() if isinstance(m, Linear))
    assert model.head.weight is model.embedding.token.weight
