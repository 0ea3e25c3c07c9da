"""The model of one tensor-parallel rank, as shapes alone."""

from __future__ import annotations

from dataclasses import replace

from fgpt.config.schema import ModelConfig, Shapes


def local_config(config: ModelConfig, tp: int) -> ModelConfig:
    """Return the configuration of one tensor rank's model: fewer heads, a narrower MLP, and a shard
    of the vocabulary, rounded up so that all shards are equal (the last rows are padding).
    """
    shapes = Shapes.of(config)
    return replace(
        config,
        n_head=shapes.n_head // tp,
        n_kv_head=shapes.n_kv_head // tp,
        d_head=shapes.d_head,
        d_ff=shapes.d_ff // tp,
        vocab_size=-(-config.vocab_size // tp),
    )
