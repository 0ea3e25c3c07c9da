"""Linear and embedding layers that leave their values to `fgpt.model.init`.

Torch's own constructors draw random values which would be thrown away; for 1.5 B parameters on a
CPU that is a quarter of a minute.
"""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """`nn.Linear` without initial values."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is; `fgpt.model.init.initialize` fills it."""


class Embedding(nn.Embedding):
    """`nn.Embedding` without initial values."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is; `fgpt.model.init.initialize` fills it."""
