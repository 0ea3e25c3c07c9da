"""Packing the weights of a decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fgpt.inference.load_decoder import pack_weights
from fgpt.model.kernels.packed_linear import packs
from fgpt.model.linear import Linear
from tests.model.test_gpt import TINY, built, tokens


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_packing_gives_the_same_logits_and_frees_what_is_not_shared(tied: bool) -> None:
    if not packs(torch.float32):
        pytest.skip("this CPU does not pack float32")
    model, ids = built(replace(TINY, tied_head=tied)).eval(), tokens(TINY)
    wanted = model(ids)
    pack_weights(model.layers().values())
    torch.testing.assert_close(model(ids), wanted, rtol=1e-4, atol=1e-5)
    assert all(m.weight.numel() == 0 for m in model.modules() if isinstance(m, Linear))
    assert model.embedding.token.weight.shape == (TINY.vocab_size, TINY.d_model)
    if tied:
        assert model.head.weight is model.embedding.token.weight
    else:
        assert model.head.weight.numel() == 0


@torch.no_grad()
def test_a_last_pipeline_stage_frees_a_tied_head() -> None:
    if not packs(torch.float32):
        pytest.skip("this CPU does not pack float32")
    layers = built(TINY).eval().layers()
    head, x = layers["head"], torch.ones(1, 1, TINY.d_model)
    wanted = head(x)
    pack_weights([layers["final_norm"], head])
    torch.testing.assert_close(head(x), wanted, rtol=1e-4, atol=1e-5)
    assert head.weight.numel() == 0
