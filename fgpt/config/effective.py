"""What DeepSpeed is given: the resolved JSON, with FGPT's changes and the reason of each.

Pure functions of the resolved configuration: nothing later changes the JSON.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, NamedTuple

from fgpt.config.batch import GLOBAL, Batch
from fgpt.config.deepspeed.settings import (
    GRAD_ACCUM_DTYPE,
    DeepSpeedSettings,
    set_at,
    value_at,
)
from fgpt.config.schema import RunConfig


class EngineChange(NamedTuple):
    """One key that DeepSpeed is given with another value than the resolved JSON's."""

    key: str
    """Dotted."""
    user: Any
    """The resolved JSON's value; None if absent."""
    engine: Any
    """The value that DeepSpeed is given; None if the key is removed."""
    reason: str
    """One sentence."""


def clips_in_fgpt(settings: DeepSpeedSettings, run: RunConfig) -> bool:
    """Whether FGPT clips the gradients instead of DeepSpeed.

    It does in the plain engine, and in fp32 without ZeRO, where DeepSpeed reports no norm.
    """
    without_zero = settings.precision == "fp32" and settings.zero_stage == 0
    return run.train.engine == "plain" or without_zero


def is_pipe_partitioned(run: RunConfig, batch: Batch) -> bool:
    """DeepSpeed's `pipe_partitioned`: whether each tensor-parallel rank sends 1/tp of a stage's
    output, which the next stage gathers.

    Not under sequence parallelism, where a rank has only its own tokens, nor for sizes that tp does
    not divide, on which DeepSpeed fails.
    """
    assert run.data.seq_len is not None  # resolved
    elements = batch.micro * run.data.seq_len // batch.cp * run.model.d_model
    return batch.tp > 1 and not run.parallel.sequence and elements % batch.tp == 0


def engine_config(
    tree: dict[str, Any], run: RunConfig, batch: Batch
) -> tuple[dict[str, Any], tuple[EngineChange, ...]]:
    """Return the JSON for deepspeed.initialize, and how it differs from the resolved `tree`."""
    engine_json = copy.deepcopy(tree)
    if run.train.engine == "plain":
        return engine_json, ()
    changes = tuple(
        EngineChange(key, value_at(tree, key), value, reason)
        for key, value, reason in _changes(DeepSpeedSettings(tree), run, batch)
    )
    for change in changes:
        set_at(engine_json, change.key, change.engine)
    return engine_json, changes


def _changes(
    settings: DeepSpeedSettings, run: RunConfig, batch: Batch
) -> Iterator[tuple[str, Any, str]]:
    """(key, value for DeepSpeed or None to remove it, reason)."""
    if clips_in_fgpt(settings, run) and settings.get("gradient_clipping") != 0:
        reason = "FGPT clips, because DeepSpeed reports no gradient norm in fp32 without ZeRO"
        yield "gradient_clipping", 0.0, reason
    if batch.cp > 1:
        reason = "DeepSpeed counts each context-parallel rank's part of a sample as a sample"
        yield GLOBAL, batch.global_size * batch.cp, reason
    if settings.get("steps_per_print") is None and settings.written("timers.throughput") is None:
        reason = "the timer synchronizes with the device, and only steps_per_print shows its times"
        yield "timers.throughput", {"enabled": False}, reason
    sums_gradients = settings.written(GRAD_ACCUM_DTYPE) is not None
    if sums_gradients and not batch.accumulates_gradients:
        reason = "each parameter has one gradient per step, so there is nothing to accumulate"
        yield GRAD_ACCUM_DTYPE, None, reason
        sums_gradients = False
    if settings.zero_stage == 2 and batch.dp * batch.cp == 1:
        # in bf16 with fp32 sums, ZeRO-1 is another optimizer, which synchronizes with the device
        if not sums_gradients and not settings.offloads_optimizer:
            reason = "one rank has nothing to shard, and ZeRO-1 does not copy gradients to buckets"
            yield "zero_optimization.stage", 1, reason
    for monitor in settings.monitors:
        reason = "FGPT opens the monitor once the run directory is this run's"
        yield f"{monitor}.enabled", False, reason
    optimizer = settings.optimizer
    if optimizer is not None and optimizer.is_handed_over:
        whose = f"{optimizer.package}'s {optimizer.name}" if optimizer.package else optimizer.name
        reason = f"FGPT builds {whose} and hands it to DeepSpeed"
        yield "optimizer", None, reason
        if settings.zero_stage > 0 and not settings.get("zero_allow_untested_optimizer"):
            yield "zero_allow_untested_optimizer", True, reason
        if settings.offloads_optimizer:
            yield "zero_force_ds_cpu_optimizer", False, reason
    for section, nvme_path in settings.nvme_paths.items():
        own = str(PurePath(nvme_path) / ("fgpt_" + re.sub(r"\W", "_", str(run.run_dir))))
        reason = "DeepSpeed empties its directory there, and another run may use the same disk"
        yield f"{section}.nvme_path", own, reason
    if batch.pp > 1 and batch.tp > 1 and not is_pipe_partitioned(run, batch):
        reason = "a stage's output does not divide evenly among the tensor-parallel ranks"
        if run.parallel.sequence:
            reason = "with parallel.sequence a rank's output is already a part of the stage's"
        for name in ("pipe_partitioned", "grad_partitioned"):
            yield f"pipeline.{name}", False, reason
