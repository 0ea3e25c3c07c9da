"""Parameter groups, and the optimizers of the DeepSpeed JSON as torch makes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fgpt.model.init import has_weight_decay


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings decay, biases and norms do not (Radford et al. 2019).

    The first takes the optimizer's own weight decay, the second's is 0. ZeRO-3's sharded parameters
    are judged by their full shape.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if has_weight_decay(name, len(shape)) else plain).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


@contextlib.contextmanager
def settings_kept(optimizer: Any) -> Iterator[None]:
    """Load a state inside; learning rate, decay, betas, ... stay what the JSON now says.

    An optimizer's state carries the settings it was saved with, and would silently undo a change.
    """
    apart = ("params", "step")  # DeepSpeed's FusedAdam counts its steps here
    before = [{k: v for k, v in g.items() if k not in apart} for g in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, before, strict=True):
        group.update(settings)


def make_adam(section: dict[str, Any], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The JSON's Adam or AdamW without DeepSpeed, for the plain engine.

    Like DeepSpeed, `Adam` decouples its weight decay unless `adam_w_mode` is false.
    """
    params = dict(section.get("params", {}))
    decoupled = params.pop("adam_w_mode", True) or section["type"] == "AdamW"
    params.pop("torch_adam", None)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(groups, **params)
