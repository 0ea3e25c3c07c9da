"""Differences between the ranks' clocks, with bounds that a slow network only widens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from fgpt.doctor.check import Check, Places

ROUNDS = 6
CLOCK_LIMIT_S = 1.0
"""Clocks that differ by more certainly disagree, in seconds."""


class ClockOffset(NamedTuple):
    """Bounds on one rank's clock minus rank 0's, in seconds."""

    low: float
    high: float

    @property
    def certain_s(self) -> float:
        """The part of the offset that is beyond doubt, with its sign; 0 if it may be none."""
        return max(self.low, 0.0) + min(self.high, 0.0)


def measure_clocks(device: torch.device, now: Callable[[], float] = time.time) -> list[ClockOffset]:
    """Each rank's offset, on all ranks. All ranks call this. `now`: this rank's clock, in seconds.

    No rank leaves an all-gather before every rank has entered it. So if a and b read their clocks
    before and after one, b's clock minus a's is at least b's before - a's after, and at most b's
    after - a's before. Each round gives such bounds, and the tightest count.
    """
    word = torch.zeros(1, device=device)
    words = [torch.empty_like(word) for _ in range(dist.get_world_size())]
    times = []
    for _ in range(ROUNDS):
        before = now()
        dist.all_gather(words, word)
        words[0].item()  # a GPU has received it
        times.append([before, now()])
    own = torch.tensor(times, dtype=torch.float64, device=device)  # [ROUNDS, 2]
    gathered = [torch.empty_like(own) for _ in words]
    dist.all_gather(gathered, own)
    return offsets_from([each.tolist() for each in gathered])


def offsets_from(times: Sequence[Sequence[Sequence[float]]]) -> list[ClockOffset]:
    """Offsets of each rank from its (before, after) of each round."""
    offsets = [ClockOffset(0.0, 0.0)]
    for rank in times[1:]:
        bounds = [
            (before - zero_after, after - zero_before)
            for (zero_before, zero_after), (before, after) in zip(times[0], rank, strict=True)
        ]
        offsets.append(ClockOffset(max(b[0] for b in bounds), min(b[1] for b in bounds)))
    return offsets


def judge_clocks(offsets: Sequence[ClockOffset], places: Places) -> list[Check]:
    """One line for each rank whose clock certainly differs from rank 0's; one ok if none does."""
    checks = [
        Check(
            "warning",
            "clock",
            f"{places.describe([rank])} is {abs(offset.certain_s):.3g} s"
            f" {'ahead of' if offset.certain_s > 0 else 'behind'} rank 0",
            "synchronize the nodes' clocks (chrony, ntpd): logs and file times mislead",
        )
        for rank, offset in enumerate(offsets)
        if abs(offset.certain_s) > CLOCK_LIMIT_S
    ]
    if checks:
        return checks
    within = max(max(abs(offset.low), abs(offset.high)) for offset in offsets)
    return [Check("ok", "clocks", f"equal within {1000 * within:.2g} ms")]
