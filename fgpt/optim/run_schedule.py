"""The learning rate by the run file's `schedule`: a factor of each parameter group's own rate.

Step k counts the applied steps before it: 0 for the first step, and a skipped step does not count.
With W = warmup_steps, D = decay_steps, N = total_steps and m = min_ratio, the factor is

    warm-up     k < W             (k + 1) / W
    constant    W <= k < N - D    1
    decay       N - D <= k < N    m + (1 - m) g(p),  p = (k - (N - D) + 1) / (D + 1)
    after it    N <= k            m  (1 without a decay)

    g(p)        linear 1 - p;  cosine (1 + cos(pi p)) / 2;  1-sqrt 1 - sqrt(p) (Haegele et al. 2024)

No step is wasted at rate 0: the first one is at 1 / W, the step W - 1 at 1, and 0 < p < 1 in the
decay. The kinds cosine and linear are the case D = N - W, constant is D = 0. Before the decay
nothing depends on N: a run extended from there has the rates of the longer run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fgpt.config.schema import ScheduleConfig

DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "1-sqrt": lambda p: 1 - math.sqrt(p),
}
"""Shape of the decay -> g(p)."""


def rate_factor(schedule: ScheduleConfig, applied_steps: int) -> float:
    """Return the learning rate of the step after `applied_steps`, as a fraction of the peak.

    `schedule`: resolved, of a kind other than deepspeed.
    """
    warmup, decay, total = schedule.warmup_steps, schedule.decay_steps, schedule.total_steps
    assert warmup is not None and decay is not None and total is not None  # resolved
    if applied_steps < warmup:
        return (applied_steps + 1) / warmup
    begin = total - decay
    if applied_steps < begin or decay == 0:
        return 1.0
    assert schedule.min_ratio is not None and schedule.decay_shape is not None  # of a decay
    progress = min(1.0, (applied_steps - begin + 1) / (decay + 1))
    floor = schedule.min_ratio
    return floor + (1 - floor) * DECAYS[schedule.decay_shape](progress)


class RunSchedule:
    """Sets the rates of an optimizer's parameter groups, each a factor of the group's own.

    It has what DeepSpeed and FGPT use of DeepSpeed's schedulers: `step`, `last_batch_iteration`.
    """

    def __init__(self, optimizer: Any, config: ScheduleConfig):
        """`optimizer`: new, its groups at their peak rates. Sets those of the first step."""
        self.optimizer, self.config = optimizer, config
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_batch_iteration: int
        """The applied steps, minus 1: DeepSpeed's counter."""
        self.step(-1)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Set the rates of the step after `last_batch_iteration` (0: the second one).

        None: of the step after the latest one.
        """
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        factor = rate_factor(self.config, last_batch_iteration + 1)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
