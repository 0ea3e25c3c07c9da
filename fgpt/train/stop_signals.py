"""SIGTERM and SIGINT: finish the step, save once, leave."""

from __future__ import annotations

import signal
from types import FrameType

import torch

from fgpt.distributed.agreements import all_reduce_max
from fgpt.engine.async_scalars import AsyncScalars


class StopSignals:
    """Remembers a signal; the ranks agree after each step whether any of them got one.

    Launchers deliver signals to one rank after the other, seconds apart: without
    the agreement the first would leave the others waiting in a collective. A second signal changes
    nothing: launchers often send two. On GPUs the agreement is read a step after it was asked for.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, device: torch.device):
        self.device = device
        self.received = 0
        self._asked = AsyncScalars(0)
        self.exit_code = 0
        """128 + the signal, as shells report it; equal on all ranks. 0 until they have agreed."""
        for number in self.SIGNALS:
            signal.signal(number, self._remember)

    @property
    def stopping(self) -> bool:
        """Whether the ranks have agreed to stop."""
        return self.exit_code > 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = max(self.received, number)

    def __call__(self) -> bool:
        """Whether to stop now; the same answer on every rank."""
        before, self._asked = self._asked, AsyncScalars(all_reduce_max(self.received, self.device))
        number = int((self._asked if self._asked.on_host else before).read()[0])
        self.exit_code = 128 + number if number else 0
        return self.stopping
