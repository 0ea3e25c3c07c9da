"""Timing several engines side by side, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fgpt.data.loader import MicroBatch
from fgpt.engine.base import Engine


@dataclass(frozen=True)
class Timing:
    """Seconds per optimizer step of one engine, one figure per round."""

    step_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.step_s)

    def spread(self) -> tuple[float, float]:
        """Fastest and slowest round, in seconds per step."""
        return min(self.step_s), max(self.step_s)

    def speed_relative_to(self, other: Timing) -> tuple[float, float, float]:
        """Median, lowest and highest of the rounds' ratios of speed; 1.0: as fast as `other`."""
        ratios = [b / a for a, b in zip(self.step_s, other.step_s, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def interleave(
    engines: dict[str, Engine],
    steps: Sequence[Sequence[MicroBatch]],
    *,
    warmup: int,
    rounds: int,
    device: torch.device,
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Run every engine over the same steps, `rounds` times in turn, after `warmup` steps each.

    `steps`: the micro-batches of each step of a round. The order of the engines turns from round to
    round. Returns each engine's timing and its last loss (a fast engine must compute the same).
    """
    losses: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        for i in range(warmup):
            engine.train_batch(steps[i % len(steps)])
    names = list(engines)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _wait(device)
            t0 = time.perf_counter()
            for micro_batches in steps:
                losses[name] = engines[name].train_batch(micro_batches).loss
            _wait(device)
            seconds[name].append((time.perf_counter() - t0) / len(steps))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}, losses


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
