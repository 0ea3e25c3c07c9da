"""What failures of devices cost a long run, and how often it should save."""

from __future__ import annotations

import math
from dataclasses import dataclass

DEVICE_MTBF_H = 50_700.0
"""Hours between two failures of one device that end a run: Grattafiori et al. 2024, table 5, had
419 in 54 days on 16,384 GPUs."""
RESTART_S = 600.0
"""From a failure to the first step after it: to notice it, to start processes, to read weights."""


@dataclass(frozen=True)
class Goodput:
    """Shares of the wall time of a run that saves every `interval_s` seconds."""

    failures_per_day: float
    interval_s: float
    """Between two checkpoints."""
    saving: float
    """Share of the time in which training waits for a save."""
    lost: float
    """Share of the time whose steps a failure loses."""
    restarting: float
    """Share of the time between a failure and the next step."""

    @property
    def goodput(self) -> float:
        """Share of the time in steps that are kept."""
        return max(1 - self.saving - self.lost - self.restarting, 0.0)


def goodput(
    gpus: int,
    stall_s: float,
    *,
    save_s: float = 0.0,
    interval_s: float | None = None,
    device_mtbf_h: float = DEVICE_MTBF_H,
    restart_s: float = RESTART_S,
) -> Goodput:
    """Return what failures cost.

    `stall_s`: seconds that training waits at a save; `save_s`: seconds until an asynchronous save
    is complete, during which a failure still loses the steps since the one before. Without
    `interval_s`, the best one: sqrt(2 stall MTBF) (Young 1974), no shorter than a save takes.
    """
    mtbf_s = device_mtbf_h * 3600 / gpus
    if interval_s is None:
        interval_s = max(math.sqrt(2 * stall_s * mtbf_s), save_s, stall_s, 1.0)
    return Goodput(
        failures_per_day=86_400 / mtbf_s,
        interval_s=interval_s,
        saving=stall_s / (interval_s + stall_s),
        lost=(interval_s / 2 + save_s) / mtbf_s,
        restarting=restart_s / mtbf_s,
    )
