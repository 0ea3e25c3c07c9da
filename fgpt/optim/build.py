"""Parameter groups, and the optimizers that FGPT builds itself."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fgpt.config.schema import ModelConfig, Shapes
from fgpt.optim.optimizers import OPTIMIZERS, Optimizer, adam_rate, is_matrix, peak_rate

if TYPE_CHECKING:
    from fgpt.optim.muon import MatrixUpdate, Muon


def has_weight_decay(name: str, n_dims: int) -> bool:
    """Whether weight decay applies: to matrices and embeddings, not to biases and norms."""
    return n_dims >= 2 and not name.endswith("bias")


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], *, muon: bool = False
) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings decay, biases and norms do not (Radford et al. 2019).

    `parameters`: (logical name, parameter). The first group takes the optimizer's weight decay; the
    second group's is 0. `muon`: the matrices of blocks come first, in a third group; `orthogonal`
    tells them apart. ZeRO-3's sharded parameters are judged by their full shape.
    """
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in parameters:
        n_dims = len(getattr(parameter, "ds_shape", parameter.shape))
        if muon and is_matrix(name, n_dims):
            matrices.append(parameter)
        else:
            (decayed if has_weight_decay(name, n_dims) else undecayed).append(parameter)
    if not muon:
        return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    others: list[dict[str, Any]] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    if not decayed:
        # a pipeline stage of blocks alone: DeepSpeed fails on an empty group, and sums the gradient
        # norm over the stages group by group, so that each stage needs as many
        halves = undecayed[:1], undecayed[1:]
        others = [{"params": half, "weight_decay": 0.0} for half in halves]
    return [
        {"params": matrices, "orthogonal": True},
        *({**group, "orthogonal": False} for group in others),
    ]


def make_optimizer(section: dict[str, Any], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build an optimizer without DeepSpeed: torch's Adam or AdamW, Muon, or a package's.

    Like DeepSpeed, `Adam` decouples its weight decay unless `adam_w_mode` is false.
    """
    params = dict(section.get("params", {}))
    table = OPTIMIZERS[section["type"].lower()]
    optimizer: torch.optim.Optimizer
    if table.package:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of its 4-bit products
        from bitsandbytes import optim

        optimizer = getattr(optim, section["type"])(groups, **params)
        return optimizer
    if table.is_own:
        return _make_muon(table, params, groups)
    decoupled = params.pop("adam_w_mode", True) or section["type"] == "AdamW"
    params.pop("torch_adam", None)
    adam = torch.optim.AdamW if decoupled else torch.optim.Adam
    return adam(groups, **params)


# the functions below import `fgpt.optim.muon`, which most runs do not need


def _make_muon(table: Optimizer, params: dict[str, Any], groups: list[dict[str, Any]]) -> Muon:
    from fgpt.optim.muon import Muon

    values = {name: params.get(name, key.default) for name, key in table.params.items()}
    names = ("momentum", "nesterov", "betas", "eps", "weight_decay")
    rate = peak_rate(params)
    options = {name: values[name] for name in names}
    return Muon(groups, lr=rate, lr_ratio=adam_rate(params) / rate, **options)


def muon_update(
    section: Mapping[str, Any], model: ModelConfig, dtype: torch.dtype, *, on_cuda: bool
) -> MatrixUpdate:
    """How Muon, with these optimizer.params, updates the matrices of a model of this dtype."""
    from fgpt.optim.muon import MatrixUpdate

    params = section.get("params", {})
    keys = OPTIMIZERS["muon"].params
    scale, steps, method = (
        params.get(name, keys[name].default) for name in ("adjust_lr_fn", "ns_steps", "ns_method")
    )
    shapes = Shapes.of(model)
    queries = shapes.n_head // shapes.n_kv_head
    if method == "gram" and dtype == torch.bfloat16:
        dtype = torch.float16 if on_cuda else torch.float32
    return MatrixUpdate((queries, shapes.d_head), scale, steps, method, dtype)
