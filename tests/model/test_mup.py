"""muP: initial values, the factors of the forward pass, and what they are for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fgpt.config.schema import ModelConfig
from fgpt.model.init import initial_value
from fgpt.model.kv_cache import KVCache
from fgpt.optim.build import LearningRateFactors, make_optimizer, matrix_group, parameter_groups
from tests.model.test_gpt import LLAMA, TINY, built, tokens

MUP = replace(TINY, mup_base=16, mup_base_d_head=4)
SECTION = {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95]}}


def test_initial_values():
    shape = torch.Size((64, 64))
    for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.gate", "mlp.down"):
        full = initial_value(f"blocks.1.{name}.weight", shape, TINY, 1)
        narrowed = initial_value(f"blocks.1.{name}.weight", shape, MUP, 1)
        torch.testing.assert_close(narrowed, full / math.sqrt(64 / 16), msg=name)
    for name in ("embedding.token", "embedding.position", "head", "blocks.1.mlp_norm"):
        values = (initial_value(f"{name}.weight", shape, c, 1) for c in (TINY, MUP))
        assert torch.equal(*values), name


@pytest.mark.parametrize("base", [TINY, LLAMA], ids=["gpt2", "llama"])
def test_the_forward_pass_has_two_factors(base: ModelConfig):
    """Those of the logits and of the queries, moved into the last norm, and into the norm of the
    queries or their rows.
    """
    config = replace(base, mup_base=16, mup_base_d_head=4, init_std=0.2)
    model, plain = built(config).eval(), built(base).eval()
    plain.load_state_dict(model.state_dict())
    heads = config.n_head // (config.n_kv_head or config.n_head)
    d_head = config.d_model // config.n_head
    with torch.no_grad():
        for parameter in plain.final_norm.parameters():
            parameter *= 16 / 64
        for block in plain.blocks:
            if block.attention.q_norm is not None:
                block.attention.q_norm.weight *= math.sqrt(4 / d_head)
                continue
            for parameter in block.attention.qkv.parameters():
                rows = parameter.view(-1, heads + 2, d_head, *parameter.shape[1:])
                rows[:, :heads] *= math.sqrt(4 / d_head)
    ids = tokens(config)
    torch.testing.assert_close(model(ids), plain(ids), rtol=1e-4, atol=1e-5)
    assert model(ids).abs().max() > 0.3
    cache = KVCache(config, torch.zeros(2, dtype=torch.int64), 32, torch.float32)
    torch.testing.assert_close(model.decode(ids, cache), model(ids)[:, -1], rtol=1e-4, atol=1e-5)


def test_the_base_is_the_model_without_mup():
    config = replace(TINY, mup_base=64, mup_base_d_head=16)
    ids = tokens(config)
    assert torch.equal(built(config)(ids), built(TINY)(ids))
    assert matrix_group(SECTION, config) is None


def change_of_logits(width: int, *, mup: bool) -> float:
    """Root mean square of what five steps of Adam change, for models with heads of 16."""
    config = ModelConfig(
        vocab_size=64, max_seq_len=32, n_layer=2, d_model=width, n_head=width // 16,
        init_std=0.1, mup_base=32 if mup else None,
    )  # fmt: skip
    model, ids = built(config), tokens(config)
    groups = parameter_groups(model.named_parameters(), matrix_group(SECTION, config))
    optimizer = make_optimizer(SECTION, groups)
    if mup and width > 32:
        LearningRateFactors(optimizer)
    before = model(ids).detach()
    for _ in range(5):
        model(ids, ids.roll(-1, dims=1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((model(ids).detach() - before).square().mean().sqrt())


def test_updates_do_not_grow_with_the_width():
    standard, mup = ([change_of_logits(w, mup=m) for w in (32, 512)] for m in (False, True))
    assert standard[0] == mup[0]
    assert standard[1] > 3 * standard[0]
    assert 0.5 < mup[1] / mup[0] < 1.5
