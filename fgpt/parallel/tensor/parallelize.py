"""From a plain GPT to one rank's part of it: modules are swapped from outside, by a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
class Split:
    """How tensor parallelism is to be done."""

    group: Group
    vocab_size: int
    """Rows of the whole vocabulary."""
    sequence: bool
    """Share the tokens out between the split layers."""
    unfused: bool
    """Call each layer by itself, as ZeRO-3 needs (`UnfusedColumnParallelProjection`)."""

    def columns(self, _: Any = None) -> ColumnParallelProjection:
        """What stands where an input enters column-split layers."""
        return (UnfusedColumnParallelProjection if self.unfused else ColumnParallelProjection)(
            self.group, self.sequence
        )

    def rows(self, plain: nn.Linear) -> RowParallelLinear:
        """A row-split layer."""
        return RowParallelLinear(plain, self.group, self.sequence)

    def embedding(self, plain: nn.Embedding) -> VocabParallelEmbedding:
        """The split embedding."""
        return VocabParallelEmbedding(plain, self.vocab_size, self.group, self.sequence)

    def head(self, plain: Any) -> VocabParallelHead:
        """The split head."""
        return VocabParallelHead(plain, self.columns())

    def loss(self, _: Any) -> Any:
        """The loss of split logits."""
        return partial(vocab_parallel_cross_entropy, vocab_size=self.vocab_size, group=self.group)


SWAPS: Mapping[type[nn.Module], Mapping[str, Callable[[Split, Any], Any]]] = {
    Attention: {"project_input": Split.columns, "out": Split.rows},
    Mlp: {"project_input": Split.columns, "down": Split.rows},
    InputEmbedding: {"token": Split.embedding},
    GPT: {"head": Split.head, "loss": Split.loss},
}
"""Kind of module -> its attribute -> what takes its place."""


def parallelize(
    model: GPT, config: ModelConfig, groups: ProcessGroups, *, sequence: bool, unfused: bool = False
) -> None:
    """Make a GPT of `local_config(config, tp)` this rank's part of the GPT of `config`.

    Parameters stay the ones that they are, wherever they are; no value is read or written.
    """
    if groups.tensor is not None:
        split = Split(groups.tensor, config.vocab_size, sequence, unfused)
        for module in list(model.modules()):
            for name, swap in SWAPS.get(type(module), {}).items():
                setattr(module, name, swap(split, getattr(module, name)))
    if groups.context is not None:
        for module in model.modules():
            if isinstance(module, Attention):
                module.kernel = UlyssesAttention(module.kernel, groups.context)
    _set_shard_indices(model, groups, sequence)


def _set_shard_indices(model: GPT, groups: ProcessGroups, sequence: bool) -> None:
    """Which tokens and heads each module sees, for positions and dropout masks."""
    place, grid = groups.coordinates, groups.grid
    tokens = place.context * grid.tp + place.tensor if sequence else place.context
    for module in model.modules():
        if isinstance(module, InputEmbedding):
            module.shard_index = module.dropout.shard_index = tokens
        elif isinstance(module, Block):
            module.attention_dropout.shard_index = module.mlp_dropout.shard_index = tokens
            module.attention.shard_index = (
                place.context
            )  # it sees what the tensor ranks have gathered
            module.attention.dropout.shard_index = place.tensor * grid.cp + place.context
