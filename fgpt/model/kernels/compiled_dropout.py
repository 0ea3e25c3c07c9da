"""Dropout of activations in one kernel; the slow twin is `fgpt.model.dropout.drop`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fgpt.model.dropout import drop
from fgpt.model.kernels.compiled_part import compile_part

P = 0.3
"""A probability for the trial: any will do."""


def compile_drop(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tensor, float], Tensor] | None:
    """Return `drop` compiled, or None, with a warning, where it does not agree with it on
    activations of `shape`, values and gradients.
    """
    draw = partial(torch.randn, shape, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(1)
    x, grad = draw(generator=generator), draw(generator=generator)
    hashes = torch.arange(x[..., 0].numel(), device=device, dtype=torch.int32).view(shape[:-1])

    def outputs(function: Callable[[Tensor, Tensor, float], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        y = function(leaf, hashes * 0x1234567, P)
        return y.detach(), torch.autograd.grad(y, leaf, grad)[0]

    tolerance = torch.finfo(dtype).eps
    return compile_part(drop, drop, outputs, tolerance, "dropout of activations")
