"""Every initial value of the model, in one place.

    parameter                         initial value
    token and position embeddings     normal(0, init_std)
    untied head                       normal(0, init_std)
    linear weights                    normal(0, init_std)
    ... that write into the residual  normal(0, init_std / sqrt(2 n_layer))   (GPT-2, section 2.3)
        stream (attention.out, mlp.down)
    biases                            0
    norm weights                      1

Each tensor's numbers are a function of (seed, logical name) alone, drawn on the CPU in float32: the
order of construction, the number of ranks and the device do not matter, and a sharded layout slices
the very same tensor.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The full float32 tensor of parameter `name` (`blocks.3.attention.qkv.weight`), on the CPU.

    Raises ValueError for a name the table above does not know.
    """
    module, _, kind = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if kind == "bias":
        return torch.zeros(shape)
    if leaf.endswith("norm"):
        return torch.ones(shape)
    std = config.init_std
    if leaf in ("out", "down"):
        std /= math.sqrt(2 * config.n_layer)
    elif leaf not in ("token", "position", "head", "qkv", "up", "gate"):
        raise ValueError(f"no initial value is defined for parameter {name!r}")
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of a whole (not sharded) model; tied tensors are filled once."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, config, seed))


def has_weight_decay(name: str, n_dims: int) -> bool:
    """Whether weight decay applies: to matrices and embeddings, not to biases and norms."""
    return n_dims >= 2 and not name.endswith("bias")
