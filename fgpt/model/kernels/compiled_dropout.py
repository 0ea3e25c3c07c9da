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

    def outputs(function: Callable[[Tensor, Tensor, float], Tensor]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(1)
        draw = partial(torch.randn, shape, generator=generator, device=device, dtype=dtype)
        x, grad = draw().requires_grad_(), draw()
        hashes = torch.arange(shape[0] * shape[1], device=device, dtype=torch.int32) * 0x1234567
        y = function(x, hashes.view(shape[:-1]), P)
        return y.detach(), torch.autograd.grad(y, x, grad)[0]

    tolerance = torch.finfo(dtype).eps
    return compile_part(drop, drop, outputs, tolerance, "dropout of activations")
