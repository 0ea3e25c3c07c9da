"""Linear and embedding layers that leave their values to `fgpt.model.init`.

Torch's own constructors draw random values which would be thrown away; for 1.5 B parameters on a
CPU that is a quarter of a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

Inward = Callable[..., Sequence[Tensor]]
"""(x, layer, ...) -> each layer's output: where an input enters its projections.

The seam for tensor parallelism, whose ranks pool their inputs, or the inputs' gradients, here.
"""


def each(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """One layer after the other."""
    return [layer(x) for layer in layers]


class Linear(nn.Linear):
    """`nn.Linear` without initial values."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is; `fgpt.model.init.initialize` fills it."""


class Embedding(nn.Embedding):
    """`nn.Embedding` without initial values."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is; `fgpt.model.init.initialize` fills it."""
