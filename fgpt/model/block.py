"""One transformer block: attention and MLP, each on a residual branch."""

from __future__ import annotations

from torch import Tensor, nn

from fgpt.config.schema import ModelConfig
from fgpt.model.attention import Attention
from fgpt.model.kv_cache import LayerCache
from fgpt.model.mlp import Mlp
from fgpt.model.norm import make_norm


class Block(nn.Module):
    """Pre-norm: x + f(norm(x)) (GPT-2). Post-norm: norm(x + f(x)) (Vaswani et al. 2017)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pre_norm = config.norm_place == "pre"
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = Mlp(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), cache))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, cache)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))
