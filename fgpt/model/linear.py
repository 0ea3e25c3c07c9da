"""Linear and embedding layers that leave their values to `fgpt.model.init`.

Torch's own constructors draw random values which would be thrown away; for 1.5 B parameters on a
CPU that is a quarter of a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

InputProjection = Callable[..., Sequence[Tensor]]
"""(x, layer, ...) -> each layer's output: where an input enters its projections.

The seam for tensor parallelism, whose ranks pool their inputs, or the inputs' gradients, here.
"""
Project = Callable[..., Tensor]
"""(x [.., I], weight [O, I], bias [O] or None) -> x weight^T + bias [.., O]: who multiplies."""


def apply_each(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """One layer after the other."""
    return [layer(x) for layer in layers]


class Linear(nn.Linear):
    """`nn.Linear` without initial values."""

    project: Project = staticmethod(F.linear)

    def reset_parameters(self) -> None:
        """Leave the memory as it is; `fgpt.model.init.initialize` fills it."""

    def forward(self, input: Tensor) -> Tensor:
        """[.., inputs] -> [.., outputs]."""
        return self.project(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` without initial values."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is; `fgpt.model.init.initialize` fills it."""


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, whose three products go through oneDNN in float32 on a CPU.

    Torch gives them to MKL, which takes twice as long on CPUs of another maker than its own: see
    `fgpt.model.cpu_features.prefers_onednn`.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    y: Tensor = _OneDnn.apply(x, weight, bias)
    return y


class _OneDnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (N, O)
        return (
            _product(grad, weight.t()) if wants_x else None,
            _product(rows.t(), x.flatten(0, -2).t()) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


# an operator of its own: torch.compile's rewrite of oneDNN's takes constant weights only
@torch.library.custom_op("fgpt::onednn_product", mutates_args=())
def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [.., K], b [N, K] -> a b^T + bias [.., N]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product


@_product.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]))
