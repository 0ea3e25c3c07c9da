"""Parameter groups, and the optimizers that FGPT builds itself."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from fgpt.optim.optimizers import OPTIMIZERS


def has_weight_decay(name: str, n_dims: int) -> bool:
    """Whether weight decay applies: to matrices and embeddings, not to biases and norms."""
    return n_dims >= 2 and not name.endswith("bias")


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings decay, biases and norms do not (Radford et al. 2019).

    The first group takes the optimizer's weight decay; the second group's is 0. ZeRO-3's sharded
    parameters are judged by their full shape.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if has_weight_decay(name, len(shape)) else undecayed).append(parameter)
    return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]


def make_optimizer(section: dict[str, Any], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build an optimizer without DeepSpeed: torch's Adam or AdamW, or an installed package's.

    Like DeepSpeed, `Adam` decouples its weight decay unless `adam_w_mode` is false.
    """
    params = dict(section.get("params", {}))
    optimizer: torch.optim.Optimizer
    if OPTIMIZERS[section["type"].lower()].package:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of its 4-bit products
        from bitsandbytes import optim

        optimizer = getattr(optim, section["type"])(groups, **params)
        return optimizer
    decoupled = params.pop("adam_w_mode", True) or section["type"] == "AdamW"
    params.pop("torch_adam", None)
    adam = torch.optim.AdamW if decoupled else torch.optim.Adam
    return adam(groups, **params)
