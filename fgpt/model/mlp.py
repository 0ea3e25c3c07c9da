"""The feed-forward network of a block: up projection, activation, down projection."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig, Shapes
from fgpt.model.linear import InputProjection, Linear, apply_each


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU: the tanh approximation (Hendrycks & Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, Primer)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "relu": F.relu,
    "relu2": squared_relu,
}


class Mlp(nn.Module):
    """down(f(up(x))), or SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = Shapes.of(config).d_ff
        self.gate = (
            Linear(config.d_model, width, bias=config.bias)
            if config.activation == "swiglu"
            else None
        )
        self.up = Linear(config.d_model, width, bias=config.bias)
        self.down = Linear(width, config.d_model, bias=config.bias)
        self.activation = ACTIVATIONS.get(config.activation)
        self.project_input: InputProjection = apply_each

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.gate is not None:
            gate, up = self.project_input(x, self.gate, self.up)  # (B, T, F) each
            hidden = F.silu(gate) * up
        else:
            assert self.activation is not None
            (up,) = self.project_input(x, self.up)  # (B, T, F)
            hidden = self.activation(up)
        return self.down(hidden)  # (B, T, D)
