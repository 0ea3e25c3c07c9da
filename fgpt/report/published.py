"""The tables published for the "base" environment, as printed and counted right.

Batch 32, sequence 128; each figure is of 3 rounds of 500 samples. The machine was not named.

One card's training throughput divides the samples of all rounds by the time of one. Two cards'
throughputs divide the 250 samples that one of them had in a round by the time of all rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROUND = 500
"""Samples of a round."""
ROUNDS = 3


@dataclass(frozen=True)
class Published:
    """One line of a published table."""

    cards: int
    billions: float
    """Parameters."""
    train_ms: float
    train_sps: float
    predict_ms: float
    predict_sps: float
    memory_gb: float
    """2^30 bytes, of one card."""

    @property
    def train_samples_per_s(self) -> float:
        """Samples of all cards over the time they took."""
        return 1000 * self._samples / self.train_ms

    @property
    def predict_samples_per_s(self) -> float:
        """The same of predictions."""
        return 1000 * self._samples / self.predict_ms

    @property
    def _samples(self) -> int:
        """How many were computed in the printed times: of one round, or of all."""
        return ROUND if self.cards == 1 else ROUND * ROUNDS


SINGLE = (
    Published(1, 0.001, 209.825, 7148.8, 53.019, 9430.532, 0.208),
    Published(1, 0.009, 540.858, 2773.371, 154.5, 3236.25, 0.665),
    Published(1, 0.071, 2794.232, 536.82, 903.021, 553.697, 2.676),
    Published(1, 0.143, 5807.015, 258.308, 1812.458, 275.868, 5.014),
    Published(1, 0.286, 11623.487, 129.049, 3642.887, 137.254, 9.689),
)
MULTI = (
    Published(2, 0.001, 604.663, 413.453, 85.774, 2914.636, 0.214),
    Published(2, 0.009, 1490.268, 167.755, 244.134, 1024.028, 0.699),
    Published(2, 0.071, 6532.981, 38.267, 1336.805, 187.013, 2.943),
    Published(2, 0.143, 12880.158, 19.41, 2664.64, 93.821, 5.546),
    Published(2, 0.286, 25467.03, 9.817, 5338.4, 46.831, 10.754),
)


def speed_of_two() -> tuple[Sequence[float], Sequence[float]]:
    """How many times as fast two cards were as one, row by row: training, prediction."""
    pairs = list(zip(SINGLE, MULTI, strict=True))
    return (
        [two.train_samples_per_s / one.train_samples_per_s for one, two in pairs],
        [two.predict_samples_per_s / one.predict_samples_per_s for one, two in pairs],
    )
