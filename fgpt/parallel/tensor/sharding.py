"""How tensor parallelism shards each parameter: the table, and functions that follow from it.

Any contiguous slice of whole head groups, MLP units or vocabulary rows is a smaller model (see
`fgpt.model.attention`), so a rank's shard is one slice along one dimension. Parameters have the
same logical names in every layout.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig
from fgpt.model.gpt import GPT
from fgpt.model.init import initial_value
from fgpt.parallel.topology import ProcessGroups

SHARD_DIMS: Mapping[str, int] = {
    "embedding.token.weight": 0,
    "head.weight": 0,
    "*.attention.qkv.*": 0,
    "*.attention.out.weight": 1,
    "*.mlp.gate.*": 0,
    "*.mlp.up.*": 0,
    "*.mlp.down.weight": 1,
}
"""Logical name -> the dimension that tensor parallelism shards. Other parameters are replicated:
norms, the position table, and the biases of row-parallel layers.
"""


def shard_dim(name: str) -> int | None:
    """Return the dimension along which a parameter is sharded; None: it is replicated."""
    return next(
        (dim for pattern, dim in SHARD_DIMS.items() if fnmatch.fnmatch(name, pattern)), None
    )


def is_qk_norm(name: str) -> bool:
    """Whether a parameter is replicated, but applied to different heads on each rank."""
    return name.endswith((".q_norm.weight", ".k_norm.weight"))


def full_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return logical name -> shape of every parameter of the unsharded model."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(config).named_parameters()}


def shard_box(
    name: str, shape: Sequence[int], rank: int, tp: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (offsets, sizes) of a tensor rank's shard in a full parameter, without padding."""
    offsets, sizes = [0] * len(shape), list(shape)
    dim = shard_dim(name)
    if dim is not None:
        size = -(-shape[dim] // tp)
        offsets[dim] = min(rank * size, shape[dim])
        sizes[dim] = min((rank + 1) * size, shape[dim]) - offsets[dim]
    return tuple(offsets), tuple(sizes)


def shard_parameter(name: str, full: Tensor, rank: int, tp: int) -> Tensor:
    """Return tensor rank `rank`'s shard of a full parameter; padding rows are zero."""
    dim = shard_dim(name)
    if dim is None or tp == 1:
        return full
    offsets, sizes = shard_box(name, full.shape, rank, tp)
    shard = full.narrow(dim, offsets[dim], sizes[dim])
    padding = list(sizes)
    padding[dim] = -(-full.shape[dim] // tp) - sizes[dim]
    if padding[dim] == 0:
        return shard
    return torch.cat([shard, shard.new_zeros(padding)], dim=dim)


def unshard_parameter(name: str, shards: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Return the full parameter of this shape from all tensor ranks' shards in order."""
    dim = shard_dim(name)
    if dim is None:
        return shards[0]
    return torch.cat(list(shards), dim=dim).narrow(dim, 0, shape[dim])


def initial_shards(config: ModelConfig, seed: int, rank: int, tp: int) -> Callable[[str], Tensor]:
    """Return logical name -> this rank's shard of the initial value, float32 on the CPU."""
    shapes = full_shapes(config)

    def initial_shard(name: str) -> Tensor:
        return shard_parameter(name, initial_value(name, shapes[name], config, seed), rank, tp)

    return initial_shard


@torch.no_grad()
def fill_parameters(parameters: Mapping[str, nn.Parameter], value: Callable[[str], Tensor]) -> None:
    """Copy `value(logical name)` into each parameter."""
    for name, parameter in parameters.items():
        parameter.copy_(value(name))


def prepare_tensor_parallel_gradients(
    parameters: Mapping[str, nn.Parameter], groups: ProcessGroups, sequence: bool
) -> None:
    """Prepare parameters for gradients on several tensor ranks, before the engine wraps them.

    Sharded parameters are marked `model_parallel`: DeepSpeed's gradient norm counts the others on
    one rank only. Replicated parameters that each rank applies to its own tokens or heads get a
    hook that sums their gradients.
    """
    group = groups.tensor
    if group is None:
        return

    def sum_gradient(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    for name, parameter in parameters.items():
        if shard_dim(name) is not None:
            parameter.model_parallel = True  # type: ignore[attr-defined]  # read by DeepSpeed
        elif sequence or is_qk_norm(name):
            parameter.register_hook(sum_gradient)
