"""The training loop: take a step, tell the hooks, act when it is time, until the last step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from fgpt.data.loader import MicroBatches
from fgpt.engine.base import Engine, PendingStep, StepResult
from fgpt.utils.fault_injection import fault_point


@dataclass(frozen=True)
class StepEvent:
    """One finished optimizer step."""

    step: int
    """Steps taken so far, this one included."""
    result: StepResult
    """What the engine says of it."""
    elapsed_s: float
    """Time of the whole step, loading included, in seconds."""
    data_wait_s: float
    """How much of it was waiting for data, in seconds."""


Hook = Callable[[StepEvent], None]


class Action(Protocol):
    """What is to be done at certain steps, with the engine as it is then."""

    def due(self, step: int) -> bool:
        """Whether it is this step's turn; asked on all ranks, with one answer."""
        ...

    def now(self) -> None:
        """Do it."""
        ...


def train(
    engine: Engine,
    batches: MicroBatches,
    hooks: Sequence[Hook],
    actions: Sequence[Action],
    *,
    last_step: int,
    should_stop: Callable[[], bool],
    rank: int,
) -> None:
    """Train up to `last_step`, or until `should_stop` (which all ranks answer alike).

    Hooks are told of a step when its numbers are there, at the latest a step later; before an
    action, of every step so far.
    """
    told = DeferredHooks(hooks)
    try:
        while engine.step < last_step and not should_stop():
            t0, waited_s = time.perf_counter(), batches.wait_s
            fault_point("data", rank, engine.step)
            micro_batches = batches.at(engine.step)
            fault_point("forward", rank, engine.step)
            taken = engine.train_batch(micro_batches)
            fault_point("step", rank, engine.step)
            elapsed_s = time.perf_counter() - t0
            told.later(engine.step, taken, elapsed_s, batches.wait_s - waited_s)
            if due := [action for action in actions if action.due(engine.step)]:
                told.all()
            for action in due:
                action.now()
        told.all()
    except Exception:  # whatever it was: the step before it is told of, and it is raised again
        with suppress(Exception):  # the first error is the one to report
            told.all()
        raise


class DeferredHooks:
    """What the hooks know of the steps taken."""

    def __init__(self, hooks: Sequence[Hook]):
        self.hooks = hooks
        self.last: tuple[int, PendingStep, float, float] | None = None

    def later(self, step: int, taken: PendingStep, elapsed_s: float, data_wait_s: float) -> None:
        """Tell of the step before this one, and of this one unless that would wait."""
        self.all()
        self.last = (step, taken, elapsed_s, data_wait_s)
        if taken.numbers.on_host:
            self.all()

    def all(self) -> None:
        """Tell of every step. Waiting for the last one is part of its time."""
        if self.last is None:
            return
        (step, taken, elapsed_s, data_wait_s), self.last = self.last, None
        t0 = time.perf_counter()
        result = taken.result()
        elapsed_s += time.perf_counter() - t0
        event = StepEvent(step, result, elapsed_s, data_wait_s)
        for hook in self.hooks:
            hook(event)
