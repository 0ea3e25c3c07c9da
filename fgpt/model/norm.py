"""The two normalisations, by the names of the run file."""

from __future__ import annotations

from torch import nn

from fgpt.config.schema import ModelConfig


def make_norm(config: ModelConfig, width: int | None = None) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last dimension.

    `width` defaults to d_model. RMSNorm has no bias; LayerNorm's follows `config.bias`.
    """
    width = config.d_model if width is None else width
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
