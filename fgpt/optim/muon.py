"""Muon: momentum, orthogonalized, for the matrices of blocks; AdamW for everything else.

Its definition is torch.optim.Muon's (Jordan et al. 2024), with one difference: the rows of q, k and
v, which FGPT keeps in one parameter, are three matrices. Momentum and weight decay are elementwise,
so they run on whatever part of a parameter an engine keeps. Only the orthogonalization needs whole
matrices: `WholeMatrices` has them, `fgpt.parallel.matrices` collects them from the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fgpt.optim.newton_schulz import NewtonSchulz, orthogonalize
from fgpt.optim.optimizers import MOMENTUM

UpdateScale = Literal["original", "match_rms_adamw"]


@dataclass(frozen=True)
class MatrixUpdate:
    """How the momentum of a parameter becomes its update."""

    qkv: tuple[int, int]
    """(query heads per key/value head, d_head) of the fused projection."""
    scale: UpdateScale
    """What an orthogonal [M, N] is multiplied by: sqrt(max(1, M / N)), or 0.2 sqrt(max(M, N)), so
    that an element is as large as in an update of AdamW (Liu et al. 2025, Moonlight)."""
    steps: int
    method: NewtonSchulz
    dtype: torch.dtype
    """In which matrices are multiplied."""

    @property
    def momentum_dtype(self) -> torch.dtype:
        """In which ranks send each other momenta: float16 has not their range."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def __call__(self, matrices: Tensor) -> Tensor:
        """Return the scaled orthogonal matrices [..., M, N], in `dtype`."""
        high, wide = matrices.shape[-2:]
        scale = math.sqrt(max(1.0, high / wide))
        if self.scale == "match_rms_adamw":
            scale = 0.2 * math.sqrt(max(high, wide))
        update = orthogonalize(matrices, steps=self.steps, method=self.method, dtype=self.dtype)
        return update.mul_(scale)

    def split(self, name: str, weight: Tensor) -> list[Tensor]:
        """The matrices in a whole parameter: itself, or those of q, k and v."""
        if not is_qkv(name):
            return [weight]
        queries, d_head = self.qkv
        heads = weight.view(-1, queries + 2, d_head, weight.shape[1])  # [G, R + 2, K, D]
        parts = heads.split([queries, 1, 1], dim=1)
        return [part.reshape(-1, weight.shape[1]) for part in parts]

    def join(self, name: str, matrices: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        if not is_qkv(name):
            return matrices[0]
        queries, d_head = self.qkv
        wide = matrices[0].shape[1]
        sizes = (queries, 1, 1)
        heads = [m.view(-1, n, d_head, wide) for m, n in zip(matrices, sizes, strict=True)]
        return torch.cat(heads, dim=1).view(-1, wide)


def is_qkv(name: str) -> bool:
    """Whether a parameter has the rows of q, k and v."""
    return name.endswith("attention.qkv.weight")


Orthogonalize = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
"""(parameters as the optimizer has them, momenta of their sizes): replaces momenta by updates, in
place. All ranks that share a matrix call it together."""


class WholeMatrices:
    """`Orthogonalize` for whole parameters, one at a time: the slow twin of the distributed one."""

    def __init__(self, names: Mapping[Tensor, str], update: MatrixUpdate):
        """`names`: parameter -> logical name."""
        self.names, self.update = names, update

    def __call__(self, parameters: Sequence[Tensor], momenta: Sequence[Tensor]) -> None:
        for parameter, momentum in zip(parameters, momenta, strict=True):
            name = self.names[parameter]
            matrices = self.update.split(name, momentum)
            momentum.copy_(self.update.join(name, [self.update(m) for m in matrices]))


class Muon(torch.optim.AdamW):
    """Groups with `orthogonal` true are trained by Muon, the others by AdamW.

    A group's learning rate is its `lr`, which is the same in all groups, so that every schedule can
    set it, times its `lr_factor`.
    """

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any):
        """`defaults`: of a group: lr, momentum, nesterov, betas, eps, weight_decay."""
        muon = {name: defaults.pop(name) for name in ("momentum", "nesterov")}
        super().__init__([{**muon, **group} for group in groups], **defaults)
        self.orthogonalize: Orthogonalize | None = None
        """Set once the engine has its own parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if group["orthogonal"]:
                self._step_matrices(group)
        with self._others():
            super().step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        momenta = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            if MOMENTUM not in state:
                state[MOMENTUM] = torch.zeros_like(parameter)
            state[MOMENTUM].lerp_(gradient, 1 - group["momentum"])
            if group["nesterov"]:
                momenta.append(gradient.lerp(state[MOMENTUM], group["momentum"]))
            else:
                momenta.append(state[MOMENTUM].clone())
        if not parameters:  # a skipped step
            return
        rate = group["lr"] * group["lr_factor"]
        assert self.orthogonalize is not None
        self.orthogonalize(parameters, momenta)
        for parameter, update in zip(parameters, momenta, strict=True):
            parameter.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate)

    @contextmanager
    def _others(self) -> Iterator[None]:
        """Inside, the optimizer has AdamW's groups only, with their own rates.

        Not by `LearningRateFactors`: torch may call its hooks in this class's step and in AdamW's.
        """
        all_groups = self.param_groups
        self.param_groups = [group for group in all_groups if not group["orthogonal"]]
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= group["lr_factor"]
        try:
            yield
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
            self.param_groups = all_groups
