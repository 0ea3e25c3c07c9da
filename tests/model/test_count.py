"""count.py against torch: numel, the FLOP counter, the tensors that autograd saves."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fgpt.config.presets import PRESETS
from fgpt.model import count
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize

TINY = replace(PRESETS["tiny"], vocab_size=512, n_layer=2, d_model=64, max_seq_len=64)
LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position": "rotary",
    "n_kv_head": 2,
    "bias": False,
    "tied_head": False,
}
VARIANTS = {
    "gpt2": {},
    "llama": LLAMA,
    "seed": {"d_head": 32, "d_ff": 24, "position": "sinusoidal"},
    "post": {"norm_place": "post", "activation": "relu"},
    "qk": {"qk_norm": True, "activation": "relu2", "position": "none"},
}
# where torch's CPU kernels are fused as the GPU's are; RMSNorm and fused GQA keep more on a CPU
EXACT = {
    "gpt2": {},
    "rotary": {"position": "rotary"},
    "relu": {"activation": "relu"},
    "relu2": {"activation": "relu2", "position": "sinusoidal"},
    "swiglu": {"activation": "swiglu", "tied_head": False},
    "post": {"norm_place": "post"},
    "seed": {"d_head": 32, "d_ff": 24},
    "written out": {"attention": "reference"},
    "written out, groups": {"attention": "reference", "n_kv_head": 2},
    "dropout": {"dropout": 0.1},
    "window": {"window": 16, "window_pattern": 2},
    "loss terms": {"z_loss": 1e-4, "logit_softcap": 30.0},
}


def batch(config, micro_batch=2):
    ids = torch.randint(0, config.vocab_size, (micro_batch, config.max_seq_len))
    return ids, ids.roll(-1, dims=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_numel(variant):
    config = replace(TINY, **VARIANTS[variant])
    assert count.n_params(config) == sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_models_parameters(name):
    with torch.device("meta"):
        model = GPT(PRESETS[name])
    assert count.n_params(PRESETS[name]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "billions", "digits"),
    [
        ("seed-1m", 0.001, 3),
        ("seed-9m", 0.009, 3),
        ("seed-71m", 0.071, 3),
        ("seed-143m", 0.143, 3),
        ("seed-286m", 0.286, 3),
        ("gpt2", 0.124, 3),
        ("gpt2-medium", 0.355, 3),
        ("gpt2-large", 0.774, 3),
        ("gpt2-xl", 1.558, 3),
        ("gpt3-2.7b", 2.7, 1),
        ("gpt3-6.7b", 6.7, 1),
        ("gpt3-13b", 12.9, 1),
        ("gpt3-175b", 175, 0),
        ("gpt-530b", 529.6, 1),
        ("gpt-1t", 1008.0, 1),
        ("llama-8b", 8.03, 2),
        ("llama-70b", 70.6, 1),
        ("llama-405b", 405.9, 1),
        ("qwen3-0.6b", 0.596, 3),
    ],
)
def test_published_parameter_counts(name, billions, digits):
    assert round(count.n_params(PRESETS[name]) / 1e9, digits) == billions


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_match_torchs_counter(variant):
    # the reference kernel: the counter does not know the CPU's fused attention
    config = replace(TINY, attention="reference", **VARIANTS[variant])
    model = GPT(config)
    initialize(model, config, seed=0)
    ids, targets = batch(config)
    with FlopCounterMode(display=False) as forward:
        loss = model(ids, targets)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    seq_len = config.max_seq_len
    assert forward.get_total_flops() == ids.numel() * count.forward_flops_per_token(config, seq_len)
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == ids.numel() * count.training_flops_per_token(config, seq_len)


def test_causal_attention_counts_half_of_the_scores():
    full = count.forward_flops_per_token(TINY, 64, "full")
    none = count.forward_flops_per_token(TINY, 0)
    assert count.forward_flops_per_token(TINY, 64, "causal") - none == (full - none) / 2
    # by hand: 2 layers x 4 T H K, the scores and the mix of the values
    assert full - none == 2 * 4 * 64 * 64


def test_recomputation_adds_one_forward_of_the_blocks():
    plain = count.training_flops_per_token(TINY, 64)
    blocks = count.forward_flops_per_token(TINY, 64) - 2 * TINY.vocab_size * TINY.d_model
    assert count.training_flops_per_token(TINY, 64, recompute=True) == plain + blocks


def saved_bytes(model, ids, targets):
    """Bytes of the storages that autograd saves, without parameters; and the loss."""
    storages = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, targets)
    return sum(s.nbytes() for s in storages.values()), loss


@pytest.mark.parametrize("fused_loss", [False, True], ids=["written-out", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", EXACT)
def test_activation_bytes_match_autograd(variant, dtype, fused_loss):
    config = replace(TINY, **EXACT[variant])
    model = GPT(config)
    initialize(model, config, seed=0)
    ids, targets = batch(config, micro_batch=4)
    model.head.fused = fused_loss
    measured, loss = saved_bytes(model.to(dtype), ids, targets)
    loss.backward()  # frees the saved tensors
    expected = count.activation_bytes(config, *ids.shape, dtype.itemsize, fused_loss=fused_loss)
    # rotary tables, positions and loss scalars are left out of the formula
    assert measured == pytest.approx(expected, rel=0.02)
