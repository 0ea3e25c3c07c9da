"""Scalars copied from the device without stalling it.

`float(tensor)` waits until the GPU has finished all queued work; the GPU then idles until Python
queues more. `AsyncScalars` starts the copy and is read later, usually one step later, when the
values have long arrived.
"""

from __future__ import annotations

import torch
from torch import Tensor


class AsyncScalars:
    """Numbers on their way to the host."""

    def __init__(self, *numbers: Tensor | float):
        """Each a Python number or a tensor []; tensors are all on one device."""
        tensors = [n for n in numbers if isinstance(n, Tensor)]
        self._numbers = list(numbers)
        self._arrived: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            stacked = torch.stack([t.detach().float() for t in tensors])
            host = torch.empty(stacked.shape, pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            arriving = iter(host)
            self._numbers = [next(arriving) if isinstance(n, Tensor) else n for n in numbers]
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def on_host(self) -> bool:
        """Whether they never were anywhere else. The same on every rank, so that the ranks can read
        at the same moment; whether they have arrived would not be.
        """
        return self._arrived is None

    def read(self) -> list[float]:
        """The numbers; waits for them, and for nothing that the device was told later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(n) for n in self._numbers]
