"""Parameter groups, and the optimizers that FGPT builds itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fgpt.config.schema import ModelConfig, Shapes, width_ratio
from fgpt.optim.optimizers import OPTIMIZERS, Optimizer, adam_rate, is_matrix, peak_rate

if TYPE_CHECKING:
    from fgpt.optim.muon import MatrixUpdate, Muon


def has_weight_decay(name: str, n_dims: int) -> bool:
    """Whether weight decay applies: to matrices and embeddings, not to biases and norms."""
    return n_dims >= 2 and not name.endswith("bias")


@dataclass(frozen=True)
class MatrixGroup:
    """How the matrices of blocks are trained, where they are a group of their own."""

    is_orthogonal: bool
    """By Muon."""
    rate: float
    """Their learning rate, as a factor of the one that a schedule sets."""
    other_rate: float
    """That of all other parameters."""
    weight_decay: float


def matrix_group(section: Mapping[str, Any], model: ModelConfig) -> MatrixGroup | None:
    """The matrices' group with this optimizer section; None: they are trained as all others.

    With muP and a model m times as wide as the base, the rate of a matrix is divided by m for Adam,
    whose updates have elements as large as the rate; by the root of m for Muon's with
    match_rms_adamw, which grow with the root of the width; Muon's original ones have a spectral
    norm of the rate at every width, and keep it (Yang et al. 2023). Decoupled weight decay, which
    the rate multiplies, is the base's; one that is added to the gradient keeps its share of it.
    """
    table, params = OPTIMIZERS[section["type"].lower()], section.get("params", {})
    ratio, other_rate = width_ratio(model), 1.0
    if table.is_own:
        scale = params.get("adjust_lr_fn", table.params["adjust_lr_fn"].default)
        rate = ratio**-0.5 if scale == "match_rms_adamw" else 1.0
        other_rate = adam_rate(params) / peak_rate(params)
    elif ratio == 1:
        return None
    else:
        rate = 1 / ratio
    decay = params.get("weight_decay", table.params["weight_decay"].default)
    factor = 1 / rate if _is_decoupled(section) else math.sqrt(rate)
    return MatrixGroup(table.is_own, rate, other_rate, decay * factor)


def _is_decoupled(section: Mapping[str, Any]) -> bool:
    """Whether the optimizer takes weight decay from the weights; else it adds it to gradients."""
    kind = section["type"].lower()
    if kind == "adam":
        return bool(section.get("params", {}).get("adam_w_mode", True))
    return kind != "adagrad"


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], matrix_group: MatrixGroup | None = None
) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings decay, biases and norms do not (Radford et al. 2019).

    `parameters`: (logical name, parameter). The first group takes the optimizer's weight decay; the
    second group's is 0. `matrix_group`: the matrices of blocks come first, in a third group, and
    the groups have `lr_factor`s: see `LearningRateFactors`. ZeRO-3's sharded parameters are judged
    by their full shape.
    """
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in parameters:
        n_dims = len(getattr(parameter, "ds_shape", parameter.shape))
        if matrix_group is not None and is_matrix(name, n_dims):
            matrices.append(parameter)
        else:
            (decayed if has_weight_decay(name, n_dims) else undecayed).append(parameter)
    if matrix_group is None:
        return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    others: list[dict[str, Any]] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    if not decayed:
        # a pipeline stage of blocks alone: DeepSpeed fails on an empty group, and sums the gradient
        # norm over the stages group by group, so that each stage needs as many
        halves = undecayed[:1], undecayed[1:]
        others = [{"params": half, "weight_decay": 0.0} for half in halves]
    first = {"params": matrices, "weight_decay": matrix_group.weight_decay}
    groups = [{**first, "lr_factor": matrix_group.rate}]
    groups += [{**group, "lr_factor": matrix_group.other_rate} for group in others]
    if matrix_group.is_orthogonal:
        groups = [{**group, "orthogonal": group is groups[0]} for group in groups]
    return groups


class LearningRateFactors:
    """While an optimizer takes a step, its groups' learning rates are their `lr` times `lr_factor`.

    So `lr` can be the same in all groups, as every schedule sets it. DeepSpeed may step some of the
    groups alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.rates: list[tuple[dict[str, Any], float]] = []
        optimizer.register_step_pre_hook(self._multiply)
        optimizer.register_step_post_hook(self._restore)

    def _multiply(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._restore()  # after a step that raised
        for group in optimizer.param_groups:
            self.rates.append((group, group["lr"]))
            group["lr"] *= group["lr_factor"]

    def _restore(self, *_: Any) -> None:
        for group, rate in self.rates:
            group["lr"] = rate
        self.rates.clear()


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
    for name in ("adam_w_mode", "torch_adam"):
        params.pop(name, None)
    adam = torch.optim.AdamW if _is_decoupled(section) else torch.optim.Adam
    return adam(groups, **params)


# the functions below import `fgpt.optim.muon`, which most runs do not need


def _make_muon(table: Optimizer, params: dict[str, Any], groups: list[dict[str, Any]]) -> Muon:
    from fgpt.optim.muon import Muon

    values = {name: params.get(name, key.default) for name, key in table.params.items()}
    names = ("momentum", "nesterov", "betas", "eps", "weight_decay")
    return Muon(groups, lr=peak_rate(params), **{name: values[name] for name in names})


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
