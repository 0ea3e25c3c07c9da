"""The run file's `schedule`: learning rate, momentum and weight decay as functions of the step.

Step k counts the applied steps before it: 0 for the first step, and a skipped step does not count.
With W = warmup_steps, D = decay_steps, N = total_steps and m = min_ratio, the learning rate is each
parameter group's own times

    warm-up     k < W             (k + 1) / W
    constant    W <= k < N - D    1
    decay       N - D <= k < N    m + (1 - m) g(p),  p = (k - (N - D) + 1) / (D + 1)
    after it    N <= k            m  (1 without a decay)

    g(p)        linear 1 - p;  cosine (1 + cos(pi p)) / 2;  1-sqrt 1 - sqrt(p) (Haegele et al. 2024)

No step is wasted at rate 0: the first one is at 1 / W, the step W - 1 at 1, and 0 < p < 1 in the
decay. The kinds cosine and linear are the case D = N - W, constant is D = 0. Before the decay
nothing depends on N: a run extended from there has the rates of the longer run.

    momentum        k < M: start + (own - start) k / M, else its own;  M = momentum_warmup_steps
    weight decay    own times 1 (constant), the factor above (with_lr), or 1 - k / N (linear)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fgpt.config.schema import ScheduleConfig
from fgpt.optim.schedules import hyperparameters

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


def momentum(schedule: ScheduleConfig, own: float, applied_steps: int) -> float:
    """Return the momentum of the step after `applied_steps`; `own`: the optimizer's."""
    start, steps = schedule.momentum_start, schedule.momentum_warmup_steps
    if applied_steps >= steps:
        return own
    assert start is not None  # resolved
    return start + (own - start) * applied_steps / steps


def weight_decay_factor(schedule: ScheduleConfig, applied_steps: int) -> float:
    """Return the weight decay of the step after `applied_steps`, as a fraction of the optimizer's.

    With decoupled decay (AdamW) the learning rate multiplies it once more.
    """
    if schedule.weight_decay == "constant":
        return 1.0
    if schedule.weight_decay == "with_lr":
        return rate_factor(schedule, applied_steps)
    assert schedule.total_steps is not None  # resolved
    return max(0.0, 1 - applied_steps / schedule.total_steps)


class RunSchedule:
    """Sets the hyperparameters of an optimizer's groups, by what each group had at first.

    It has what DeepSpeed and FGPT use of DeepSpeed's schedulers: `step`, `last_batch_iteration`.
    """

    def __init__(self, optimizer: Any, config: ScheduleConfig):
        """`optimizer`: new, with the values of its configuration. Sets those of the first step."""
        self.optimizer, self.config = optimizer, config
        self.own = hyperparameters(optimizer)
        # Adam's groups beside those of an optimizer with momentum keep their betas
        self._warms_betas = not any("momentum" in own for own in self.own)
        self.last_batch_iteration: int
        """The applied steps, minus 1: DeepSpeed's counter."""
        self.step(-1)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Set the values of the step after `last_batch_iteration` (0: the second one).

        None: of the step after the latest one.
        """
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        for group, own in zip(self.optimizer.param_groups, self.own, strict=True):
            group.update(self._values(own, last_batch_iteration + 1))

    def _values(self, own: Mapping[str, Any], applied_steps: int) -> dict[str, Any]:
        """The values of a group for the step after `applied_steps`; a weight decay of 0 stays 0."""
        config = self.config
        values = {"lr": own["lr"] * rate_factor(config, applied_steps)}
        if "weight_decay" in own:
            decay_factor = weight_decay_factor(config, applied_steps)
            values["weight_decay"] = own["weight_decay"] * decay_factor
        if "momentum" in own:
            values["momentum"] = momentum(config, own["momentum"], applied_steps)
        elif "betas" in own and self._warms_betas:
            beta1, *others = own["betas"]
            values["betas"] = (momentum(config, beta1, applied_steps), *others)
        return values
