"""DeepSpeed's learning-rate schedules as functions of the step, for the plain engine.

DeepSpeed sets the rate of step k from its counter k - 1, which is -1 before the first step: that
step runs at the schedule's lowest rate, and with a linear warm-up from 0 the second one does too.
`test_schedule.py` holds every function here against DeepSpeed's class of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Params = dict[str, Any]


def _warm(counter: int, params: Params) -> float:
    """How far the warm-up has come, 0 .. 1."""
    steps = max(2, params.get("warmup_num_steps", 1000))
    if counter >= steps:
        return 1.0
    if params.get("warmup_type", "log") == "linear":
        return counter / steps
    return math.log(counter + 1) / math.log(steps)


def _warmup_lr(counter: int, base: float, params: Params) -> float:
    low = params.get("warmup_min_lr", 0.0)
    high = params.get("warmup_max_lr")
    high = base if high is None else high
    return low + (high - low) * _warm(max(counter, 0), params)


def _warmup_decay_lr(counter: int, base: float, params: Params) -> float:
    warm_steps = max(2, params.get("warmup_num_steps", 1000))
    with_default = {"warmup_max_lr": 0.001, **params}
    if counter < warm_steps:
        return _warmup_lr(counter, base, with_default)
    total = params["total_num_steps"]
    left = max(0.0, (total - counter) / max(1.0, total - warm_steps))
    low, high = with_default.get("warmup_min_lr", 0.0), with_default["warmup_max_lr"]
    return low + (high - low) * left


def _warmup_cosine_lr(counter: int, base: float, params: Params) -> float:
    if counter < 0:
        return 0.0
    warm_steps = max(2, params.get("warmup_num_steps", 1000))
    if counter < warm_steps:
        low = params.get("warmup_min_ratio", 0.0)
        return base * (low + (1 - low) * _warm(counter, params))
    floor = params.get("cos_min_ratio", 0.0001)
    length = max(1, params["total_num_steps"] - warm_steps)
    progress = min(1.0, (counter - warm_steps + 1) / length)
    return base * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def _lr_range_test(counter: int, base: float, params: Params) -> float:
    interval = (counter + 1) / params.get("lr_range_test_step_size", 2000)
    if params.get("lr_range_test_staircase", False):
        interval = math.floor(interval)
    growth = params.get("lr_range_test_step_rate", 1.0)
    return params.get("lr_range_test_min_lr", 0.001) * (1 + growth * interval)


SCHEDULES: dict[str, Callable[[int, float, Params], float]] = {
    "WarmupLR": _warmup_lr,
    "WarmupDecayLR": _warmup_decay_lr,
    "WarmupCosineLR": _warmup_cosine_lr,
    "LRRangeTest": _lr_range_test,
}


def learning_rate(section: dict[str, Any] | None, base: float, applied_steps: int) -> float:
    """The rate of the next optimizer step, after `applied_steps` that were not skipped.

    `section` is the JSON's scheduler (None: constant), `base` the optimizer's `lr`.
    """
    if section is None:
        return base
    return SCHEDULES[section["type"]](applied_steps - 1, base, section.get("params", {}))
