"""The training loop: steps, hooks for their results, actions between steps, stop signals."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from fgpt.data.loader import MicroBatches
from fgpt.distributed.agreements import all_reduce_max
from fgpt.distributed.progress import DATA, FIRST_STEP, STEP, Progress
from fgpt.engine.base import AsyncScalars, Engine, PendingStep, StepResult
from fgpt.errors import FgptError
from fgpt.utils.fault_injection import fault_point


@dataclass(frozen=True)
class StepEvent:
    """One finished optimizer step."""

    step: int
    """Steps taken so far, this one included."""
    result: StepResult
    """The engine's result."""
    elapsed_s: float
    """Duration of the step including data loading, in seconds."""
    data_wait_s: float
    """Part of it spent waiting for data, in seconds."""


Hook = Callable[[StepEvent], None]


class Action(Protocol):
    """Something to do every so many steps."""

    every: int
    """Interval in steps; 0: never."""
    phase: str
    """What the rank does meanwhile (`fgpt.distributed.progress`)."""

    def run(self) -> None:
        """Perform the action on the engine's current step. Collective."""
        ...


def train(
    engine: Engine,
    batches: MicroBatches,
    hooks: Sequence[Hook],
    actions: Sequence[Action],
    *,
    last_step: int,
    should_stop: Callable[[], bool],
    after_step: Callable[[], None] = lambda: None,
    rank: int,
    progress: Progress,
) -> None:
    """Train up to `last_step`, or until `should_stop`, which returns the same on all ranks.

    Hooks get a step's metrics at most one step late; all pending metrics are flushed before an
    action. `after_step` runs after each step and its actions, on all ranks. `progress` notes
    each phase.
    """
    deferred = DeferredHooks(hooks, progress)
    phase = FIRST_STEP
    try:
        while engine.step < last_step and not should_stop():
            t0, waited_s = time.perf_counter(), batches.wait_s
            progress.enter(DATA, engine.step)
            progress.batch_size = batches.size_at(engine.step)
            fault_point("data", rank, engine.step)
            micro_batches = batches.at(engine.step)
            progress.enter(phase)
            fault_point("forward", rank, engine.step)
            pending = engine.train_batch(micro_batches)
            fault_point("step", rank, engine.step)
            phase, progress.step = STEP, engine.step
            elapsed_s = time.perf_counter() - t0
            deferred.add(engine.step, pending, elapsed_s, batches.wait_s - waited_s)
            if due := [a for a in actions if a.every > 0 and engine.step % a.every == 0]:
                deferred.flush()
            for action in due:
                with progress.during(action.phase):
                    action.run()
            after_step()
        deferred.flush()
    except Exception as error:  # raised again: the metrics of the steps before are kept
        step = progress.step
        with suppress(Exception):  # the first error is the one to report
            # the device may wait for another rank for ever, unless that rank raises the same error
            if (isinstance(error, FgptError) and error.agreed) or deferred.is_ready:
                deferred.flush()
        progress.step = step
        raise


class DeferredHooks:
    """Calls the hooks one step late on a GPU, so that reading metrics does not stall it."""

    def __init__(self, hooks: Sequence[Hook], progress: Progress):
        """`progress` is at the pending step while its result is read: an error is that step's."""
        self.hooks, self.progress = hooks, progress
        self._last: tuple[int, PendingStep, float, float] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether `flush` does not wait for the device."""
        return self._last is None or self._last[1].scalars.is_ready

    def add(self, step: int, pending: PendingStep, elapsed_s: float, data_wait_s: float) -> None:
        """Call the hooks for the step before, and for this one if its metrics are on the host."""
        self.flush()
        self._last = (step, pending, elapsed_s, data_wait_s)
        if pending.scalars.on_host:
            self.flush()

    def flush(self) -> None:
        """Call the hooks for the pending step; waiting for the device counts as its time."""
        if self._last is None:
            return
        (step, pending, elapsed_s, data_wait_s), self._last = self._last, None
        newest, self.progress.step = self.progress.step, step - 1
        t0 = time.perf_counter()
        result = pending.result()
        elapsed_s += time.perf_counter() - t0
        event = StepEvent(step, result, elapsed_s, data_wait_s)
        for hook in self.hooks:
            hook(event)
        self.progress.step = newest


class DeferredMax:
    """The maximum of a number over all ranks; on a GPU that of the call before, because reading the
    newest would stall the device.
    """

    def __init__(self, device: torch.device, first: int):
        """`first`: what the first call returns on a GPU."""
        self.device = device
        self._latest = AsyncScalars(first)

    def __call__(self, number: int) -> int:
        """Return the maximum; equal on every rank."""
        previous = self._latest
        self._latest = AsyncScalars(all_reduce_max(number, self.device))
        readable = self._latest if self._latest.on_host else previous
        return int(readable.read()[0])
