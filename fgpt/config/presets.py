"""Model shapes by name. A preset is a `ModelConfig`; a run file or flag may change any field.

A test compares the parameter counts of `fgpt.model.count.n_params` with the published ones.
"""

from __future__ import annotations

from dataclasses import replace

from fgpt.config.schema import ModelConfig


def _gpt2(name: str, n_layer: int, d_model: int, n_head: int) -> ModelConfig:
    # Radford et al. 2019; vocabulary 50257 rounded up to a multiple of 64 for the matrix units.
    return ModelConfig(
        preset=name,
        vocab_size=50304,
        max_seq_len=1024,
        n_layer=n_layer,
        d_model=d_model,
        n_head=n_head,
    )


def _gpt3(name: str, n_layer: int, d_model: int, n_head: int, d_head: int) -> ModelConfig:
    # Brown et al. 2020, table 2.1. The 13B row says width 5140; its 40 heads of 128 give 5120.
    gpt2 = _gpt2(name, n_layer, d_model, n_head)
    return replace(gpt2, max_seq_len=2048, d_head=d_head)


def _megatron(name: str, n_layer: int, d_model: int, n_head: int) -> ModelConfig:
    # Narayanan et al. 2021, table 1
    gpt2 = _gpt2(name, n_layer, d_model, n_head)
    return replace(gpt2, max_seq_len=2048, vocab_size=51200)


def _llama(name: str, n_layer: int, d_model: int, n_head: int, d_ff: int) -> ModelConfig:
    # Grattafiori et al. 2024, table 3
    return ModelConfig(
        preset=name,
        vocab_size=128256,
        max_seq_len=8192,
        n_layer=n_layer,
        d_model=d_model,
        n_head=n_head,
        n_kv_head=8,
        d_ff=d_ff,
        position="rotary",
        rotary_base=500000.0,
        norm="rmsnorm",
        activation="swiglu",
        tied_head=False,
        bias=False,
    )


def _seed(name: str, n_layer: int, d_model: int, d_head: int, d_ff: int) -> ModelConfig:
    # published benchmark models: sequence 128, 8 heads that are wider than d_model / 8, a narrow
    # MLP, no embedding; a vocabulary of 64 keeps their parameter counts to three decimals of 1e9
    return ModelConfig(
        preset=name,
        vocab_size=64,
        max_seq_len=128,
        n_layer=n_layer,
        d_model=d_model,
        n_head=8,
        d_head=d_head,
        d_ff=d_ff,
        position="sinusoidal",
    )


PRESETS: dict[str, ModelConfig] = {
    config.preset: config
    for config in (
        ModelConfig(),  # tiny: trains on a laptop
        # as wide and deep as nanoGPT's for characters of Shakespeare
        ModelConfig(preset="mini", vocab_size=8192, n_layer=6, d_model=384, n_head=6),
        _seed("seed-1m", 2, 256, 64, 64),
        _seed("seed-9m", 4, 512, 128, 128),
        _seed("seed-71m", 8, 1024, 256, 256),
        _seed("seed-143m", 16, 1024, 256, 256),
        _seed("seed-286m", 32, 1024, 256, 256),
        _gpt2("gpt2", 12, 768, 12),
        _gpt2("gpt2-medium", 24, 1024, 16),
        _gpt2("gpt2-large", 36, 1280, 20),
        _gpt2("gpt2-xl", 48, 1600, 25),
        _gpt3("gpt3-1.3b", 24, 2048, 24, 128),
        _gpt3("gpt3-2.7b", 32, 2560, 32, 80),
        _gpt3("gpt3-6.7b", 32, 4096, 32, 128),
        _gpt3("gpt3-13b", 40, 5120, 40, 128),
        _gpt3("gpt3-175b", 96, 12288, 96, 128),
        _megatron("gpt-530b", 105, 20480, 128),
        _megatron("gpt-1t", 128, 25600, 160),
        _llama("llama-8b", 32, 4096, 32, 14336),
        _llama("llama-70b", 80, 8192, 64, 28672),
        _llama("llama-405b", 126, 16384, 128, 53248),
        # Yang et al. 2025, the 0.6B model: QK-norm
        ModelConfig(
            preset="qwen3-0.6b",
            vocab_size=151936,
            max_seq_len=40960,
            n_layer=28,
            d_model=1024,
            n_head=16,
            n_kv_head=8,
            d_head=128,
            d_ff=3072,
            position="rotary",
            rotary_base=1000000.0,
            norm="rmsnorm",
            norm_eps=1e-6,
            activation="swiglu",
            qk_norm=True,
            bias=False,
        ),
        # the architecture of Llama, small enough for a laptop
        ModelConfig(
            preset="llama-tiny",
            n_kv_head=2,
            position="rotary",
            norm="rmsnorm",
            activation="swiglu",
            tied_head=False,
            bias=False,
        ),
    )
}
