"""Initial values of all parameters.

    parameter                         initial value
    token and position embeddings     normal(0, init_std)
    untied head                       normal(0, init_std)
    linear weights                    normal(0, init_std)
    ... that write into the residual  normal(0, init_std / sqrt(2 n_layer))   (GPT-2, section 2.3),
        stream (attention.out, mlp.down)  or 0 with init_residual zero
    biases                            0
    norm weights                      1

With muP the linear weights are divided by the root of the width ratio (Yang et al. 2022, table 8).
Each tensor depends on (seed, logical name) only and is drawn on the CPU in float32, so every layout
and device starts from the same values; a sharded layout takes slices of the full tensors.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig, width_ratio


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Return the full initial tensor of parameter `name` (`blocks.3.attention.qkv.weight`), float32
    on the CPU. Raises ValueError for a name that is not in the table above.
    """
    # 1. constants: biases and norms
    module, _, kind = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if kind == "bias":
        return torch.zeros(shape)
    if leaf.endswith("norm"):
        return torch.ones(shape)
    # 2. standard deviation, smaller or 0 for projections into the residual stream
    std = config.init_std
    if leaf in ("qkv", "up", "gate", "out", "down"):
        std /= math.sqrt(width_ratio(config))
    elif leaf not in ("token", "position", "head"):
        raise ValueError(f"no initial value is defined for parameter {name!r}")
    if leaf in ("out", "down"):
        if config.init_residual == "zero":
            return torch.zeros(shape)
        std /= math.sqrt(2 * config.n_layer)
    # 3. draw from a generator seeded with a 63-bit hash of (seed, name)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of an unsharded model; a tied tensor is filled once."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, config, seed))
