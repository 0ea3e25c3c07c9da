"""A transformer block: attention and MLP, each on a residual branch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fgpt.config.schema import ModelConfig
from fgpt.model.attention import Attention
from fgpt.model.context import ForwardContext
from fgpt.model.dropout import Dropout
from fgpt.model.kv_cache import DecodeStep
from fgpt.model.mlp import Mlp
from fgpt.model.norm import make_norm


class Block(nn.Module):
    """Pre-norm: x + f(norm(x)) (GPT-2). Post-norm: norm(x + f(x)) (Vaswani et al. 2017)."""

    def __init__(self, config: ModelConfig, index: int, context: ForwardContext):
        """`index`: number of the block; `context`: the model's."""
        super().__init__()
        weights_dropout, attention_dropout, mlp_dropout = (
            Dropout(config.dropout, 1 + 3 * index + site, context) for site in range(3)
        )
        self.pre_norm = config.norm_place == "pre"
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, index, weights_dropout, context)
        self.mlp_norm = make_norm(config)
        self.mlp = Mlp(config)
        self.attention_dropout = attention_dropout
        self.mlp_dropout = mlp_dropout
        self.is_compiled = False
        """Whether a call runs compiled code."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile calls of the block, as `nn.Module.compile` does."""
        super().compile(*args, **kwargs)
        self.is_compiled = True

    def forward(self, x: Tensor, step: DecodeStep | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `step`: see `GPT.decode`."""
        if self.pre_norm:
            x = x + self.attention_dropout(self.attention(self.attention_norm(x), step))
            return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.attention_dropout(self.attention(x, step)))
        return self.mlp_norm(x + self.mlp_dropout(self.mlp(x)))
