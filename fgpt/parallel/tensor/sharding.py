"""Which part of each parameter a tensor-parallel rank holds: the table, and what follows from it.

The model is grouped so that any contiguous part is a smaller model (see `fgpt.model.attention`), so
a rank's part of a tensor is one slice along one dimension. Parameters are known by their logical
names in every layout.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig, Shapes
from fgpt.model.gpt import GPT
from fgpt.model.init import initial_value
from fgpt.parallel.topology import ProcessGroups

SPLIT: Mapping[str, int] = {
    "embedding.token.weight": 0,
    "head.weight": 0,
    "*.attention.qkv.*": 0,
    "*.attention.out.weight": 1,
    "*.mlp.gate.*": 0,
    "*.mlp.up.*": 0,
    "*.mlp.down.weight": 1,
}
"""Logical name -> the dimension along which tensor parallelism cuts. Others are whole on each rank:
norms, position table, and the biases that are added to a sum."""

QK_NORMS = ("*.q_norm.weight", "*.k_norm.weight")
"""Whole on each rank, but each sees its own heads only."""


def shard_dim(name: str) -> int | None:
    """The dimension along which a parameter is cut; None: each rank holds all of it."""
    return next((dim for pattern, dim in SPLIT.items() if fnmatch.fnmatch(name, pattern)), None)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a logical name fits one of these patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def local_config(config: ModelConfig, tp: int) -> ModelConfig:
    """The model that one of `tp` ranks holds: fewer heads, a narrower MLP, a part of the vocabulary
    (rounded up, so that all parts are equal: the last ranks' spare rows are padding).
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


def full_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Logical name -> shape of every parameter of the whole model."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(config).named_parameters()}


def part_of(name: str, whole: Tensor, rank: int, tp: int) -> Tensor:
    """What tensor rank `rank` holds of a whole parameter; padding rows are zero."""
    dim = shard_dim(name)
    if dim is None or tp == 1:
        return whole
    size = -(-whole.shape[dim] // tp)
    begin, end = min(rank * size, whole.shape[dim]), min((rank + 1) * size, whole.shape[dim])
    part = whole.narrow(dim, begin, end - begin)
    if end - begin == size:
        return part
    padding = list(part.shape)
    padding[dim] = size - (end - begin)
    return torch.cat([part, part.new_zeros(padding)], dim=dim)


def joined(name: str, parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """The whole parameter of this shape, from all tensor ranks' parts in order."""
    dim = shard_dim(name)
    if dim is None:
        return parts[0]
    return torch.cat(list(parts), dim=dim).narrow(dim, 0, shape[dim])


def initial_shards(config: ModelConfig, seed: int, rank: int, tp: int) -> Callable[[str], Tensor]:
    """Logical name -> this rank's part of the plain model's initial value, float32 on the CPU."""
    shapes = full_shapes(config)

    def part(name: str) -> Tensor:
        return part_of(name, initial_value(name, shapes[name], config, seed), rank, tp)

    return part


@torch.no_grad()
def fill_parameters(parameters: Mapping[str, nn.Parameter], value: Callable[[str], Tensor]) -> None:
    """Write initial values."""
    for name, parameter in parameters.items():
        parameter.copy_(value(name))


def prepare_tensor_parallel_gradients(
    parameters: Mapping[str, nn.Parameter], groups: ProcessGroups, sequence: bool
) -> None:
    """Prepare parameters for gradients over the tensor ranks, before the engine takes them.

    Cut ones are marked, for DeepSpeed counts unmarked ones once for all ranks in the gradient norm.
    Whole ones of which each rank sees a part of the tokens or heads get the sum of the gradients.
    """
    group = groups.tensor
    if group is None:
        return

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    for name, parameter in parameters.items():
        if shard_dim(name) is not None:
            parameter.model_parallel = True  # type: ignore[attr-defined]  # DeepSpeed reads it
        elif sequence or matches(name, QK_NORMS):
            parameter.register_hook(summed)
