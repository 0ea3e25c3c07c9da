"""SIGTERM and SIGINT: finish the step, save once, leave."""

from __future__ import annotations

import signal
from types import FrameType

import torch

from fgpt.engine.collect import any_rank


class StopSignals:
    """Remembers a signal; the ranks agree after each step whether any of them got one.

    Launchers deliver signals to one rank after the other, seconds apart (traps.md, D20): without the
    agreement the first would leave the others waiting in a collective.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, device: torch.device):
        self.device = device
        self.received: int | None = None
        self.stopping = False
        for number in self.SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def __call__(self) -> bool:
        """Whether to stop now; the same answer on every rank."""
        self.stopping = any_rank(self.received is not None, self.device)
        return self.stopping

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells report it; a rank told by another reports SIGTERM."""
        return 128 + (self.received or signal.SIGTERM) if self.stopping else 0
