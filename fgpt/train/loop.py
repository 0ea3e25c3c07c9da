"""The training loop: take a step, tell the hooks, until it is time to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fgpt.data.loader import MicroBatches
from fgpt.engine.base import Engine, StepResult
from fgpt.faults import fault_point


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


def train(
    engine: Engine,
    batches: MicroBatches,
    hooks: Sequence[Hook],
    *,
    last_step: int,
    should_stop: Callable[[], bool],
    rank: int,
) -> None:
    """Train up to `last_step`, or until `should_stop` (which all ranks answer alike)."""
    while engine.step < last_step and not should_stop():
        t0, waited_s = time.perf_counter(), batches.wait_s
        fault_point("data", rank, engine.step)
        micro_batches = batches.at(engine.step)
        fault_point("forward", rank, engine.step)
        result = engine.train_batch(micro_batches)
        fault_point("step", rank, engine.step)
        event = StepEvent(
            step=engine.step,
            result=result,
            elapsed_s=time.perf_counter() - t0,
            data_wait_s=batches.wait_s - waited_s,
        )
        for hook in hooks:
            hook(event)
