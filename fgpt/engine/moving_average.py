"""An exponential moving average of the weights (EMA), kept beside the master weights.

It has the masters' layout: each rank averages what it keeps of them, without communication, and a
checkpoint has it as one more state of each parameter. It is a function of the applied steps alone:

    average = d average + (1 - d) weights,  d = min(decay, (1 + n) / (10 + n)) after n steps

so that a short run does not end with its initial weights (as TensorFlow's averages begin).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """The average of one rank's master weights."""

    def __init__(self, masters: Sequence[Tensor], decay: float):
        """`masters`: tensors that stay the same objects; the average begins as their values."""
        self.decay = decay
        self._masters = [master.detach() for master in masters]
        self.tensors = [master.float().clone() for master in self._masters]
        """Float32, one of each master tensor, to read or to fill."""

    @torch.no_grad()
    def update(self, applied_steps: int) -> None:
        """Include the weights after this number of applied steps."""
        decay = min(self.decay, (1 + applied_steps) / (10 + applied_steps))
        for average, master in zip(self.tensors, self._masters, strict=True):
            average.lerp_(master.float(), 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again with the present weights."""
        torch._foreach_copy_(self.tensors, self._masters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the master weights are the average; then they are as before, bit for bit."""
        with torch.no_grad():
            saved = [master.clone() for master in self._masters]
            torch._foreach_copy_(self._masters, self.tensors)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._masters, saved)
