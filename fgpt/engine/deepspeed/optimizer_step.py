"""The optimizer step of a DeepSpeed engine: clipped, counted, at the rate it should have.

After each step DeepSpeed asks whether it was skipped, to count it and to hold the schedule. A
`SyncFreeZeroStep` does not know that yet. We first report the step as applied; if it was skipped,
DeepSpeed's counters are corrected before the next step, when reading the flag no longer stalls the
GPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from fgpt.engine.async_scalars import AsyncScalars
from fgpt.engine.base import PendingStep
from fgpt.engine.deepspeed.sync_free_step import make_sync_free
from fgpt.errors import TrainingError
from fgpt.parallel.grad_norm import global_grad_norm
from fgpt.parallel.topology import ProcessGroups


class OptimizerStep:
    """Takes the place of a DeepSpeed engine's `_take_model_step`."""

    def __init__(self, engine: DeepSpeedEngine, groups: ProcessGroups, clip: float | None):
        """`clip`: the limit where FGPT clips, and drops what is not finite; None: DeepSpeed does.
        `groups` are needed for that.
        """
        self.engine, self.groups, self.clip = engine, groups, clip
        timed = engine.wall_clock_breakdown() or engine.memory_breakdown()
        self.sync_free = make_sync_free(engine.optimizer, timed)
        self.rates = Rates(engine.optimizer, engine.lr_scheduler)
        self._clipped_norm: float | None = None
        self._unsynced: AsyncScalars | None = None
        self._take = engine._take_model_step
        engine._take_model_step = self._step

    def _step(self, lr_kwargs: Any) -> None:
        self.sync()
        if self.clip is not None:
            self._clip_or_skip(self.clip)
        self.rates.keep()
        self._take(lr_kwargs)

    def sync(self) -> None:
        """Wait for the latest step, and put DeepSpeed right if it was skipped."""
        if self._unsynced is None:
            return
        _, _, skipped = self._unsynced.read()
        self._unsynced = None
        if skipped:
            self.engine.skipped_steps += 1
            self.rates.restore()

    def pending(self, loss: Tensor) -> PendingStep:
        """The step just started, whose mean loss [] is this."""
        engine = self.engine
        if self.sync_free is not None:
            numbers = self._unsynced = AsyncScalars(
                loss, self.sync_free.norm, self.sync_free.skipped
            )
        else:
            numbers = AsyncScalars(loss, self._norm(), float(not engine.was_step_applied()))
        scale = float(engine.optimizer.cur_scale) if engine.fp16_enabled() else None
        return PendingStep(numbers, self.rates.used, scale)

    def _norm(self) -> float:
        norm = self.engine.get_global_grad_norm() if self.clip is None else self._clipped_norm
        return math.nan if norm is None else float(norm)

    def _clip_or_skip(self, limit: float) -> None:
        """Clip the averaged gradients as torch does; drop them all if they are not finite."""
        optimizer = self.engine.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = global_grad_norm(parameters, self.groups)
        # DeepSpeed reads this flag to count the skip and to leave the schedule where it is
        optimizer.overflow = not bool(torch.isfinite(norm))
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None  # torch's optimizers pass over these, weight decay included
        elif limit > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        self._clipped_norm = float(norm)


class Rates:
    """The rate that a step uses, and the way back to it: DeepSpeed's schedule goes on at once."""

    def __init__(self, optimizer: Any, scheduler: Any | None):
        self.optimizer, self.scheduler = optimizer, scheduler
        self.used = math.nan
        """The latest step's, of the first parameter group."""
        self._before: tuple[list[float], int | None] = ([], None)

    def keep(self) -> None:
        """Remember: the step comes now."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        counter = None if self.scheduler is None else self.scheduler.last_batch_iteration
        self.used, self._before = rates[0], (rates, counter)

    def restore(self) -> None:
        """Go back to it: that step was skipped."""
        rates, counter = self._before
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.scheduler is not None:
            self.scheduler.last_batch_iteration = counter


@contextlib.contextmanager
def overflow_explained(engine: DeepSpeedEngine) -> Iterator[None]:
    """Raise TrainingError where DeepSpeed gives up on fp16 inside."""
    try:
        yield
    except Exception as error:
        # DeepSpeed raises a bare Exception here, and only here
        if "loss scale already at minimum" not in str(error):
            raise
        raise TrainingError(
            f"step {engine.global_steps}: gradients overflow fp16 even at the smallest loss scale:"
            " the run diverges; lower optimizer.params.lr, or use bf16 (ds_configs/bf16.json)"
        ) from error
