"""Parallelize a plain GPT: a table of modules and the parallel layers that replace them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from fgpt.config.schema import ModelConfig
from fgpt.model.attention import Attention
from fgpt.model.block import Block
from fgpt.model.embedding import InputEmbedding
from fgpt.model.gpt import GPT
from fgpt.model.mlp import Mlp
from fgpt.parallel.tensor.collectives import Group
from fgpt.parallel.tensor.cross_entropy import vocab_parallel_cross_entropy
from fgpt.parallel.tensor.layers import (
    ColumnParallelProjection,
    RowParallelLinear,
    UlyssesAttention,
    UnfusedColumnParallelProjection,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from fgpt.parallel.topology import ProcessGroups


@dataclass(frozen=True)
class ParallelLayers:
    """Builds the tensor-parallel counterparts of plain layers."""

    group: Group
    config: ModelConfig
    """Of the full model."""
    sequence: bool
    """Sequence parallelism between the tensor-parallel layers."""
    unfused: bool
    """Call each layer, as ZeRO-3 needs (`UnfusedColumnParallelProjection`)."""

    def column_parallel(self, _: Any = None) -> ColumnParallelProjection:
        """Replaces `apply_each` in front of column-parallel layers."""
        kind = UnfusedColumnParallelProjection if self.unfused else ColumnParallelProjection
        return kind(self.group, self.sequence)

    def row_parallel(self, layer: nn.Linear) -> RowParallelLinear:
        """Replaces a linear layer."""
        return RowParallelLinear(layer, self.group, self.sequence)

    def embedding(self, embedding: nn.Embedding) -> VocabParallelEmbedding:
        """Replaces the token embedding."""
        return VocabParallelEmbedding(embedding, self.config.vocab_size, self.group, self.sequence)

    def head(self, head: Any) -> VocabParallelHead:
        """Replaces the head."""
        return VocabParallelHead(head, self.column_parallel())

    def loss(self, _: Any) -> Any:
        """Replaces `next_token_loss`."""
        return partial(
            vocab_parallel_cross_entropy,
            vocab_size=self.config.vocab_size,
            group=self.group,
            z_loss=self.config.z_loss,
        )


PARALLELIZE_PLAN: Mapping[type[nn.Module], Mapping[str, Callable[[ParallelLayers, Any], Any]]] = {
    Attention: {
        "project_input": ParallelLayers.column_parallel,
        "out": ParallelLayers.row_parallel,
    },
    Mlp: {"project_input": ParallelLayers.column_parallel, "down": ParallelLayers.row_parallel},
    InputEmbedding: {"token": ParallelLayers.embedding},
    GPT: {"head": ParallelLayers.head, "loss": ParallelLayers.loss},
}
"""Module class -> attribute -> builder of its replacement."""


def parallelize(
    model: GPT, config: ModelConfig, groups: ProcessGroups, *, sequence: bool, unfused: bool = False
) -> None:
    """Turn a GPT of `local_config(config, tp)` into this rank's shard of the GPT of `config`.

    Parameters are reused; their values are neither read nor written.
    """
    # 1. tensor parallelism: replace layers by the table
    if groups.tensor is not None:
        layers = ParallelLayers(groups.tensor, config, sequence, unfused)
        for module in list(model.modules()):
            for name, build in PARALLELIZE_PLAN.get(type(module), {}).items():
                setattr(module, name, build(layers, getattr(module, name)))
    # 2. context parallelism: wrap the attention kernels
    if groups.context is not None:
        for module in model.modules():
            if isinstance(module, Attention):
                module.kernel = UlyssesAttention(module.kernel, groups.context)
    # 3. positions and dropout masks depend on the shard that a module sees
    _set_shard_indices(model, groups, sequence)


def _set_shard_indices(model: GPT, groups: ProcessGroups, sequence: bool) -> None:
    grid, rank = groups.grid, groups.coordinates
    tokens = rank.context * grid.tp + rank.tensor if sequence else rank.context
    for module in model.modules():
        if isinstance(module, InputEmbedding):
            module.shard_index = module.dropout.shard_index = tokens
        elif isinstance(module, Block):
            module.attention_dropout.shard_index = module.mlp_dropout.shard_index = tokens
            module.attention.shard_index = rank.context  # the sequence shards are gathered
            module.attention.dropout.shard_index = rank.tensor * grid.cp + rank.context  # of heads


@contextlib.contextmanager
def without_sequence_parallelism(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, tensor-parallel layers take and return all tokens, whose number need not divide.

    For decoding. The weights are the same.
    """
    switched: list[Any] = [
        part
        for layer in layers
        for module in layer.modules()
        for part in (module, *(getattr(module, name, None) for name in _PROJECTIONS))
        if getattr(part, "sequence", False)
    ]
    for part in switched:
        part.sequence = False
    try:
        yield
    finally:
        for part in switched:
            part.sequence = True


_PROJECTIONS = ("project_input", "projection")
"""Attributes that hold a `ColumnParallelProjection`, which is not a module."""
