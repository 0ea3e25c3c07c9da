"""The widths that a `ModelConfig` leaves open, derived in one place."""

from __future__ import annotations

from dataclasses import dataclass

from fgpt.config.schema import ModelConfig


@dataclass(frozen=True)
class Shapes:
    """Every width of the model, none of them open."""

    n_head: int
    """Query heads."""
    n_kv_head: int
    """Key/value heads; each serves n_head / n_kv_head query heads."""
    d_head: int
    """Width of one head, in elements."""
    d_ff: int
    """Hidden width of the MLP, in elements."""

    @property
    def d_qkv(self) -> int:
        """Rows of the fused q, k, v projection, in elements."""
        return (self.n_head + 2 * self.n_kv_head) * self.d_head

    @classmethod
    def of(cls, config: ModelConfig) -> Shapes:
        """Fill in d_head, n_kv_head and d_ff (the rules stand at their fields in `ModelConfig`)."""
        swiglu = -(-8 * config.d_model // 3 // 64) * 64  # 8/3 d_model, up to a multiple of 64
        return cls(
            n_head=config.n_head,
            n_kv_head=config.n_kv_head or config.n_head,
            d_head=config.d_head or config.d_model // config.n_head,
            d_ff=config.d_ff or (swiglu if config.activation == "swiglu" else 4 * config.d_model),
        )
