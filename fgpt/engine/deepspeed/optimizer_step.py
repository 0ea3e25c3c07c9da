"""The optimizer step of a DeepSpeed engine: clipping, skipped steps, learning rates.

After each step DeepSpeed reads whether it was skipped, to count it and to hold the schedule. A
`SyncFreeZeroStep` leaves that flag on the device, so:

    1. report the step to DeepSpeed as applied; counters and schedule move on
    2. let the device compute; Python queues the next forward and backward pass
    3. before the next step, read the flag: the device has finished the step long ago
    4. if the step was skipped, count it and roll the schedule back
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from fgpt.engine.base import AsyncScalars, PendingStep
from fgpt.engine.deepspeed.patches import is_loss_scale_exhausted, replace_optimizer_step
from fgpt.engine.deepspeed.sync_free_step import make_sync_free
from fgpt.errors import TrainingError
from fgpt.optim.schedules import hyperparameters
from fgpt.parallel.grad_norm import global_grad_norm
from fgpt.parallel.topology import ProcessGroups


class OptimizerStep:
    """Wraps the optimizer step of a DeepSpeed engine."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        groups: ProcessGroups,
        clip: float | None,
        before_step: Callable[[], None],
        on_applied: Callable[[], None],
    ):
        """`clip`: FGPT's own limit, or None where DeepSpeed clips; `groups`: for its norm.

        `before_step` runs when the averaged gradients are complete, `on_applied` once it is known
        that the step was not skipped, at the latest before the next one.
        """
        self.engine, self.groups, self.clip = engine, groups, clip
        self.before_step, self.on_applied = before_step, on_applied
        timed = engine.wall_clock_breakdown() or engine.memory_breakdown()
        self.sync_free = make_sync_free(engine.optimizer, timed)
        self.rates = ScheduleState(engine.optimizer, engine.lr_scheduler)
        self._clipped_norm: float | None = None
        self._unread: AsyncScalars | None = None
        replace_optimizer_step(engine, self._wrap)

    def _wrap(self, upstream_step: Callable[[Any], None]) -> Callable[[Any], None]:
        def step(lr_kwargs: Any) -> None:
            self.sync()
            self.before_step()
            if self.clip is not None:
                self._clip_or_skip(self.clip)
            self.rates.record()
            upstream_step(lr_kwargs)
            if self.sync_free is None and self.engine.was_step_applied():
                self.on_applied()

        return step

    def sync(self) -> None:
        """Wait for the latest step; if it was skipped, correct DeepSpeed's counters."""
        if self._unread is None:
            return
        _, _, skipped = self._unread.read()
        self._unread = None
        if skipped:
            self.engine.skipped_steps += 1
            self.rates.roll_back()
        else:
            self.on_applied()

    def pending(self, loss: Tensor) -> PendingStep:
        """Return the step that was just queued; `loss` [] is its mean loss."""
        engine = self.engine
        if self.sync_free is not None:
            scalars = self._unread = AsyncScalars(loss, self.sync_free.norm, self.sync_free.skipped)
        else:
            scalars = AsyncScalars(loss, self._norm(), float(not engine.was_step_applied()))
        scale = float(engine.optimizer.cur_scale) if engine.fp16_enabled() else None
        return PendingStep(scalars, self.rates.used, scale)

    def _norm(self) -> float:
        norm = self.engine.get_global_grad_norm() if self.clip is None else self._clipped_norm
        return math.nan if norm is None else float(norm)

    def _clip_or_skip(self, limit: float) -> None:
        """Clip the averaged gradients as torch does; drop all of them if the norm is not finite."""
        optimizer = self.engine.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = global_grad_norm(parameters, self.groups)
        # DeepSpeed reads this flag: it counts the skip and holds the schedule
        optimizer.overflow = not bool(torch.isfinite(norm))
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None  # torch's optimizers then skip it, weight decay included
        elif limit > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        self._clipped_norm = float(norm)


class ScheduleState:
    """The learning rate of the latest step, and the schedule's state before it."""

    def __init__(self, optimizer: Any, scheduler: Any | None):
        self.optimizer, self.scheduler = optimizer, scheduler
        self.used = math.nan
        """Rate of the latest step, first parameter group."""
        self._before: tuple[list[dict[str, Any]], int | None] = ([], None)

    def record(self) -> None:
        """Save the state; called right before a step."""
        values = hyperparameters(self.optimizer)
        counter = None if self.scheduler is None else self.scheduler.last_batch_iteration
        self.used, self._before = float(values[0]["lr"]), (values, counter)

    def roll_back(self) -> None:
        """Restore the recorded state, because the step was skipped."""
        before, counter = self._before
        for group, values in zip(self.optimizer.param_groups, before, strict=True):
            group.update(values)
        if self.scheduler is not None:
            self.scheduler.last_batch_iteration = counter


@contextlib.contextmanager
def loss_scale_errors(engine: DeepSpeedEngine) -> Iterator[None]:
    """Turn DeepSpeed's error at the smallest fp16 loss scale into a TrainingError."""
    try:
        yield
    except Exception as error:
        if not is_loss_scale_exhausted(error):
            raise
        raise TrainingError(
            f"step {engine.global_steps}: gradients overflow fp16 at the smallest loss scale: the"
            " run diverges; lower optimizer.params.lr, or use bf16 (ds_configs/bf16.json)"
        ) from error
