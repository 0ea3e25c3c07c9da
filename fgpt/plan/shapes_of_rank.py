"""What one rank of a planned run holds: its shard of the model, its blocks, its parameters.

A search asks for the same shapes very often, so the answers are cached by model and degrees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from fgpt.config.schema import ModelConfig, Shapes
from fgpt.model.count import block_params
from fgpt.parallel.pipeline.partition import layer_params, stage_bounds
from fgpt.parallel.tensor.local import local_config
from fgpt.plan.planned_run import Kernels, PlannedRun

MEGATRON_VOCAB_MULTIPLE = 128
"""Megatron-LM pads the rows of the embedding to a multiple of this, times tp
(`--make-vocab-size-divisible-by`)."""


@dataclass(frozen=True)
class StageShapes:
    """One rank of a pipeline stage."""

    local: ModelConfig
    """The rank's tensor-parallel shard of the model."""
    n_blocks: int
    has_embedding: bool
    has_head: bool
    params: int
    """Parameters of the rank, before ZeRO shards them. A tied head adds its matrix only where the
    embedding is on another stage."""


def stage_shapes(run: PlannedRun, stage: int) -> StageShapes:
    """Return the shapes of one pipeline stage's ranks."""
    return _stage_shapes(run.model, run.tp, run.pp, stage, run.partition, run.kernels)


def local_model(run: PlannedRun) -> ModelConfig:
    """Return one tensor rank's model."""
    return _local_model(run.model, run.tp, run.kernels)


def distinct_stages(run: PlannedRun) -> tuple[int, ...]:
    """Return the first stage, the last, and of those between the first with each number of blocks:
    later ones have fewer micro-batches in flight.
    """
    return _distinct_stages(run.model, run.pp, run.partition)


@lru_cache(maxsize=4096)
def _distinct_stages(model: ModelConfig, pp: int, partition: str) -> tuple[int, ...]:
    bounds = _bounds(model, pp, partition)
    first: dict[int, int] = {}
    for stage in range(1, pp - 1):
        first.setdefault(bounds[stage + 1] - bounds[stage], stage)
    return tuple(sorted({0, pp - 1, *first.values()}))


@lru_cache(maxsize=4096)
def _local_model(model: ModelConfig, tp: int, kernels: Kernels) -> ModelConfig:
    shapes = Shapes.of(model)
    vocab = model.vocab_size
    if kernels == "megatron":
        multiple = MEGATRON_VOCAB_MULTIPLE * tp
        vocab = -(-vocab // multiple) * multiple
    # with more ranks than key/value heads, ranks repeat them
    padded = replace(model, vocab_size=vocab, n_kv_head=max(shapes.n_kv_head, tp))
    return local_config(padded, tp)


@lru_cache(maxsize=16384)
def _stage_shapes(
    model: ModelConfig, tp: int, pp: int, stage: int, partition: str, kernels: Kernels
) -> StageShapes:
    local = _local_model(model, tp, kernels)
    bounds = _bounds(model, pp, partition)
    has_embedding, has_head = stage == 0, stage == pp - 1
    n_blocks = bounds[stage + 1] - bounds[stage] - has_embedding - 2 * has_head
    embedding, *_, final_norm, head = layer_params(local)
    params = n_blocks * block_params(local)
    params += embedding * has_embedding + (final_norm + head) * has_head
    if local.tied_head and has_embedding and has_head:
        params -= head
    return StageShapes(
        local=local,
        n_blocks=n_blocks,
        has_embedding=has_embedding,
        has_head=has_head,
        params=params,
    )


@lru_cache(maxsize=4096)
def _bounds(model: ModelConfig, pp: int, partition: str) -> list[int]:
    return [0, model.n_layer + 3] if pp == 1 else stage_bounds(model, pp, partition)
