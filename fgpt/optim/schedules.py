"""DeepSpeed's learning-rate schedules: keys in the JSON, and rates for the plain engine.

DeepSpeed sets the rate of step k from its counter k - 1, which is -1 before the first step. The
first step therefore runs at the schedule's lowest rate, and with a linear warm-up from 0 the second
one does too. `tests/optim/test_schedules.py` compares each function with DeepSpeed's class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fgpt.utils.keys import Key

_STEPS = Key("int", low=1, auto=True)
_RATIO = Key("number", low=0, high=1)
_RATE = Key("number", low=0)
_LAST = Key("int", refused="resuming sets it")
_WARMUP: Mapping[str, Key] = {
    "warmup_num_steps": Key("int", 1000, low=0, auto=True),
    "warmup_type": Key("string", "log", words=("log", "linear")),
    "last_batch_iteration": _LAST,
}
_WARMUP_LR: Mapping[str, Key] = {
    "warmup_min_lr": Key("number", 0.0, low=0, auto=True),
    "warmup_max_lr": Key("number", low=0, open_low=True, auto=True),
    **_WARMUP,
}

SCHEDULERS: Mapping[str, Mapping[str, Key]] = {
    "WarmupLR": _WARMUP_LR,
    "WarmupDecayLR": {"total_num_steps": _STEPS, **_WARMUP_LR},
    "WarmupCosineLR": {
        "total_num_steps": _STEPS,
        "warmup_min_ratio": _RATIO,
        "cos_min_ratio": _RATIO,
        **_WARMUP,
    },
    "OneCycle": {
        "cycle_min_lr": _RATE,
        "cycle_max_lr": _RATE,
        "decay_lr_rate": _RATE,
        "cycle_first_step_size": Key("int", 2000, low=1),
        "cycle_second_step_size": Key("int", low=1, null=True),
        "cycle_first_stair_count": Key("int", 0, low=0),
        "cycle_second_stair_count": Key("int", low=0, null=True),
        "decay_step_size": Key("int", 0, low=0),
        "cycle_momentum": Key("bool", True),
        "cycle_min_mom": _RATIO,
        "cycle_max_mom": _RATIO,
        "decay_mom_rate": _RATE,
        "last_batch_iteration": _LAST,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": Key("number", 1e-3, low=0, open_low=True),
        "lr_range_test_step_size": Key("int", 2000, low=1),
        "lr_range_test_step_rate": _RATE,
        "lr_range_test_staircase": Key("bool", False),
        "last_batch_iteration": _LAST,
    },
}

REQUIRED_PARAMS: Mapping[str, tuple[str, ...]] = {
    "WarmupDecayLR": ("total_num_steps",),
    "WarmupCosineLR": ("total_num_steps",),
    "OneCycle": ("cycle_min_lr", "cycle_max_lr"),
}
"""Scheduler parameters without a default."""

Params = dict[str, Any]


def _warmup_fraction(counter: int, params: Params) -> float:
    """Fraction of the warm-up that is done, 0 to 1."""
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
    return low + (high - low) * _warmup_fraction(max(counter, 0), params)


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
        return base * (low + (1 - low) * _warmup_fraction(counter, params))
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


RATES: dict[str, Callable[[int, float, Params], float]] = {
    "WarmupLR": _warmup_lr,
    "WarmupDecayLR": _warmup_decay_lr,
    "WarmupCosineLR": _warmup_cosine_lr,
    "LRRangeTest": _lr_range_test,
}


def learning_rate(section: dict[str, Any] | None, base: float, applied_steps: int) -> float:
    """Return the learning rate of the optimizer step after `applied_steps` (skipped ones excluded).

    `section` is the JSON's scheduler (None: constant rate), `base` is optimizer.params.lr.
    """
    if section is None:
        return base
    return RATES[section["type"]](applied_steps - 1, base, section.get("params", {}))


HYPERPARAMETERS = ("lr", "momentum", "betas", "weight_decay")
"""The values of a parameter group that a schedule may change, DeepSpeed's OneCycle included."""


def hyperparameters(optimizer: Any) -> list[dict[str, Any]]:
    """Return a copy of the HYPERPARAMETERS that each parameter group has."""
    return [
        {name: group[name] for name in HYPERPARAMETERS if name in group}
        for group in optimizer.param_groups
    ]
