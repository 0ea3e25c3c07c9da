"""What a record of `fgpt bench single` or `fgpt bench multi` says, and what follows from it."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from typing import Any

SECTIONS = {"single": ("ladder", "memory", "compare"), "multi": ("layouts", "strong", "weak")}
"""The parts of each bench, in the order of the report."""
STATES = ("measured", "skipped", "failed", "wrong")
NO_HARDWARE = "hardware not recorded"


@dataclass(frozen=True)
class Rounds:
    """One thing timed several times over."""

    round_s: tuple[float, ...]
    """Seconds of each round."""
    samples: int
    """Samples of one round, of all ranks together."""

    @property
    def samples_per_s(self) -> float:
        """Samples over the median of the times they took."""
        return self.samples / statistics.median(self.round_s)

    def ms_for(self, samples: int) -> tuple[float, float, float]:
        """Milliseconds for so many samples: median, shortest and longest round."""
        scale = 1000 * samples / self.samples
        low, high = min(self.round_s), max(self.round_s)
        return scale * statistics.median(self.round_s), scale * low, scale * high


@dataclass(frozen=True)
class Figures:
    """What was measured of one scenario."""

    ranks: int
    grid: str
    """As in `tp 1 x pp 1 x cp 1 x dp 1`."""
    batch: str
    """As in `32 x 128, fp32`: samples of a step x tokens of a sample, and the number format."""
    seq_len: int
    """Tokens of a sample."""
    train: Rounds
    predict: Rounds | None
    train_ratio: tuple[float, float, float] | None
    """Speed relative to the reference's: median, lowest and highest round."""
    predict_ratio: tuple[float, float, float] | None
    """The same of predictions."""
    memory_bytes: int
    """Peak, of the rank that has most."""
    memory_what: str
    """What of the memory was counted."""
    memory_ratio: float | None
    """That peak relative to the reference's."""
    loss_departure: float | None
    """Largest relative difference from the reference's losses."""
    loss_bound: float | None
    """What of it is allowed."""
    flops_per_token: float | None
    peak_tflops: float | None
    """Of one rank's device."""
    peak_source: str | None
    shares: dict[str, float] | None
    """Of a step's time: compute, communication, pipeline, data."""
    sent_bytes: dict[str, float] | None
    """Per step and kind of group, by the rank that sends most."""
    trace: dict[str, float] | None
    """Of a traced step's time, by kind of kernel."""

    @property
    def tokens_per_s(self) -> float:
        """In training, of all ranks together."""
        return self.train.samples_per_s * self.seq_len

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, as a fraction; None where a part of it is unknown."""
        if not self.flops_per_token or not self.peak_tflops:
            return None
        return self.tokens_per_s * self.flops_per_token / (self.peak_tflops * 1e12 * self.ranks)


@dataclass(frozen=True)
class Record:
    """One scenario on one machine: measured, or why not."""

    bench: str
    row: str
    """Model preset."""
    parameters: int | None
    """Of the model."""
    env_name: str
    """Name of the rung."""
    adds: str
    section: str
    order: tuple[int, int]
    reference: str
    """The env_name that ratios are taken against."""
    state: str
    why: str | None
    hardware: str
    origin: dict[str, Any]
    """Time, command, commit and versions of the measurement; may be empty."""
    figures: Figures | None
    """None unless it was measured."""

    @property
    def on_gpu(self) -> bool:
        """Whether the hardware is a GPU: a CPU's name ends with the number of its cores."""
        return self.hardware != NO_HARDWARE and not re.search(r", \d+ cores?$", self.hardware)

    @property
    def table(self) -> tuple[str, str, str]:
        """Which table it is in: bench, hardware, section."""
        return self.bench, self.hardware, self.section
