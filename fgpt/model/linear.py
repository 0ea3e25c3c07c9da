"""Linear and embedding layers without random initial values, and the seams around their products.

`fgpt.model.init` fills the parameters. Torch's constructors would first draw values that are then
overwritten: 15 seconds for 1.5 B parameters on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

InputProjection = Callable[..., Sequence[Tensor]]
"""(x, layer, ...) -> output of each layer: where an input enters its projections.

Tensor parallelism replaces it to communicate the input or its gradient.
"""
LinearFunction = Callable[..., Tensor]
"""(x [.., I], weight [O, I], bias [O] or None) -> x weight^T + bias [.., O]."""


def apply_each(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """Apply each layer to x: the `InputProjection` without tensor parallelism."""
    return [layer(x) for layer in layers]


def scaled(x: Tensor, factor: float) -> Tensor:
    """Return x times the factor; x itself for 1."""
    return x if factor == 1 else x * factor


class Linear(nn.Linear):
    """`nn.Linear` without initial values, with a replaceable product."""

    project: LinearFunction = staticmethod(F.linear)

    def reset_parameters(self) -> None:
        """Leave the parameters uninitialized; `fgpt.model.init.initialize` fills them."""

    def forward(self, input: Tensor) -> Tensor:
        """[.., I] -> [.., O]."""
        return self.project(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` without initial values."""

    def reset_parameters(self) -> None:
        """Leave the parameters uninitialized; `fgpt.model.init.initialize` fills them."""


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, its slow twin, with all three products through oneDNN in float32 on a CPU.

    Torch uses MKL, which takes twice as long on non-Intel CPUs: see
    `fgpt.model.cpu_features.prefers_onednn`.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    y: Tensor = _OneDnnLinear.apply(x, weight, bias)
    return y


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)  # (N, O)
        return (
            _onednn_product(grad, weight.t()) if needs_x else None,
            _onednn_product(flat.t(), x.flatten(0, -2).t()) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )


# A custom operator, because torch.compile's oneDNN lowering supports constant weights only.
@torch.library.custom_op("fgpt::onednn_product", mutates_args=())
def _onednn_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [.., K], b [N, K] -> a b^T + bias [.., N]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product


@_onednn_product.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]))
