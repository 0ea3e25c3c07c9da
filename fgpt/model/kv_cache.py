"""Key/value cache for decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from fgpt.config.schema import ModelConfig, Shapes


class LayerCache:
    """Keys and values of one block: [B, G, capacity, K] each, the first `length` tokens filled."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys = keys
        self.values = values
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, G, T, K]; return all keys and values so far, [B, G, length, K].

        Raises ValueError beyond the capacity.
        """
        end = self.length + k.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"KV cache holds {self.keys.shape[2]} tokens, {end} do not fit")
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def make_kv_cache(
    config: ModelConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
) -> list[LayerCache]:
    """Return an empty `LayerCache` of `capacity` tokens for each block."""
    shapes = Shapes.of(config)
    size = (batch, shapes.n_kv_head, capacity, shapes.d_head)
    return [
        LayerCache(*(torch.empty(size, device=device, dtype=dtype) for _ in range(2)))
        for _ in range(config.n_layer)
    ]
