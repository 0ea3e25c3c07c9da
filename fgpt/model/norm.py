"""The two normalisations, by the names of the run file."""

from __future__ import annotations

from torch import nn

from fgpt.config.schema import ModelConfig


def make_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over d_model elements.

    RMSNorm has no bias; LayerNorm's follows `config.bias`.
    """
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
