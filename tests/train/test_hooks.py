"""The loop and its hooks, with a scripted engine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fgpt.distributed.progress import Progress
from fgpt.engine.base import AsyncScalars, PendingStep, StepResult
from fgpt.errors import TrainingError
from fgpt.train.hooks import MAX_FAILED_SAVES, NonFiniteGuard, Saver, weights_are_finite
from fgpt.train.loop import DeferredHooks, StepEvent, train

GOOD = StepResult(loss=2.0, grad_norm=1.0, learning_rate=0.1, skipped=False)
SKIPPED = StepResult(loss=math.nan, grad_norm=math.nan, learning_rate=0.1, skipped=True)


class Far(AsyncScalars):
    """Scalars that are still on a device; logs when they are read."""

    on_host = False  # type: ignore[assignment]

    def __init__(self, *numbers: float, log: list[Any]):
        super().__init__(*numbers)
        self.log = log

    def read(self) -> list[float]:
        self.log.append("read")
        return super().read()


def pending(result: StepResult) -> PendingStep:
    scalars = AsyncScalars(result.loss, result.grad_norm, float(result.skipped))
    return PendingStep(scalars, result.learning_rate, result.loss_scale)


@dataclass
class Engine:
    """Returns prepared results."""

    results: list[StepResult]
    step: int = 0
    seen: list[Any] = field(default_factory=list)

    def train_batch(self, micro_batches: Any) -> PendingStep:
        self.seen.append(micro_batches)
        self.step += 1
        return pending(self.results[self.step - 1])


BATCHES: Any = SimpleNamespace(
    at=lambda step: step,
    size_at=lambda step: 4,
    wait_s=0.0,
    sample_ids=lambda step: np.array([step * 4, step * 4 + 3]),
)


def event(step: int, result: StepResult) -> StepEvent:
    return StepEvent(step, result, elapsed_s=1.0, data_wait_s=0.0)


def run(
    engine: Engine, hooks: list[Any], last_step: int, stop_after: int = 99, actions: Any = ()
) -> None:
    train(
        engine,  # type: ignore[arg-type]
        BATCHES,
        hooks,
        actions,
        last_step=last_step,
        should_stop=lambda: engine.step >= stop_after,
        rank=0,
        progress=Progress(),
    )


def test_the_loop_tells_every_hook_of_every_step() -> None:
    engine, told = Engine([GOOD] * 5), []
    run(engine, [lambda e: told.append(("a", e.step)), lambda e: told.append(("b", e.step))], 2)
    assert told == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert engine.seen == [0, 1]  # the batch of step k is number k - 1, the steps taken before it


def test_the_loop_stops_when_told_and_goes_on_from_any_step() -> None:
    engine = Engine([GOOD] * 9, step=3)
    run(engine, [], last_step=9, stop_after=5)
    assert engine.seen == [3, 4]
    run(engine, [], last_step=5)
    assert engine.step == 5


class Evens:
    """An action at every second step."""

    def __init__(self, log: list[Any]):
        self.log = log

    every = 2
    phase = "evaluation"

    def run(self) -> None:
        self.log.append("act")


class FarEngine(Engine):
    """Scalars stay on the device; step `fails_at` raises."""

    def __init__(self, log: list[Any], fails_at: int = 0):
        super().__init__([])
        self.log, self.fails_at = log, fails_at

    def train_batch(self, micro_batches: Any) -> PendingStep:
        self.step += 1
        self.log.append(f"start {self.step}")
        if self.step == self.fails_at:
            raise RuntimeError("lost")
        return PendingStep(Far(float(self.step), 1.0, 0.0, log=self.log), 0.1)


def test_late_numbers_are_read_when_the_next_step_has_been_started() -> None:
    log: list[Any] = []
    run(FarEngine(log), [lambda e: log.append((e.step, e.result.loss))], 3)
    assert log == [
        *("start 1", "start 2", "read", (1, 1.0)),
        *("start 3", "read", (2, 2.0), "read", (3, 3.0)),
    ]


def test_an_action_comes_after_all_numbers_of_the_steps_before_it() -> None:
    log: list[Any] = []
    run(FarEngine(log), [lambda e: log.append(e.step)], 2, actions=[Evens(log)])
    assert log == ["start 1", "start 2", "read", 1, "read", 2, "act"]


def test_a_failing_step_does_not_hide_the_one_before_it() -> None:
    log: list[Any] = []
    with pytest.raises(RuntimeError, match="lost"):
        run(FarEngine(log, fails_at=2), [lambda e: log.append(e.step)], 5)
    assert log == ["start 1", "start 2", "read", 1]


def test_waiting_for_numbers_is_part_of_the_steps_time() -> None:
    class Slow(Far):
        def read(self) -> list[float]:
            time.sleep(0.05)
            return super().read()

    events: list[StepEvent] = []
    deferred = DeferredHooks([events.append], Progress())
    deferred.add(1, PendingStep(Slow(1.0, 1.0, 0.0, log=[]), 0.1), 1.0, 0.25)
    deferred.flush()
    assert 1.05 <= events[0].elapsed_s < 2 and events[0].data_wait_s == 0.25


def test_an_error_that_a_device_reports_late_is_of_the_step_before() -> None:
    class Failing(Far):
        def read(self) -> list[float]:
            raise RuntimeError("device-side assert")

    progress = Progress()
    deferred = DeferredHooks([], progress)
    progress.step = 7
    deferred.add(7, PendingStep(Failing(1.0, 1.0, 0.0, log=[]), 0.1), 1.0, 0.0)
    progress.step = 8
    with pytest.raises(RuntimeError, match="assert"):
        deferred.flush()
    assert progress.step == 6  # finished before the step that failed


def guard(tmp_path: Path, *results: StepResult) -> NonFiniteGuard:
    hook = NonFiniteGuard(BATCHES, 3, tmp_path, lambda: None)
    for step, result in enumerate(results, 1):
        hook(event(step, result))
    return hook


def test_skips_are_counted_in_a_row(tmp_path: Path) -> None:
    guard(tmp_path, SKIPPED, SKIPPED, GOOD, SKIPPED, SKIPPED, GOOD)
    with pytest.raises(TrainingError, match="step 4: 3 steps in a row.*samples 12 to 15"):
        guard(tmp_path, GOOD, SKIPPED, SKIPPED, SKIPPED)
    assert (tmp_path / "nonfinite_step_00000004.json").exists()


def test_fp16_may_look_for_its_scale_first(tmp_path: Path) -> None:
    def fp16(skipped: bool, scale: float) -> StepResult:
        return StepResult(2.0, math.inf if skipped else 1.0, 0.1, skipped, loss_scale=scale)

    # each overflow halves the scale, after one that only uses up the hysteresis
    searching = guard(tmp_path, *[fp16(True, 2.0 ** min(16, 17 - i)) for i in range(15)])
    searching(event(21, fp16(False, 4.0)))
    for step in (22, 23):
        searching(event(step, fp16(True, 2.0 ** (23 - step))))
    with pytest.raises(TrainingError, match="3 steps in a row"):
        searching(event(24, fp16(True, 1.0)))


def test_a_fixed_loss_scale_is_not_looked_for(tmp_path: Path) -> None:
    static = StepResult(2.0, math.inf, 0.1, skipped=True, loss_scale=1024.0)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        guard(tmp_path, *[static] * 4)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_an_applied_step_with_a_bad_loss_ends_the_run(tmp_path: Path, loss: float) -> None:
    with pytest.raises(TrainingError, match="though its gradients were applied"):
        guard(tmp_path, StepResult(loss, 1.0, 0.1, skipped=False))


def test_a_guard_that_cannot_write_still_says_what_happened(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="samples 8 to 11: lower"):
        guard(tmp_path / "gone", SKIPPED, SKIPPED, SKIPPED)


class Saves:
    """Saves that fail while `full` is set; one in the background is written after two more steps.

    Takes the place of `Checkpoints`.
    """

    device = torch.device("cpu")

    def __init__(self, every: int, background: bool = False):
        self.engine = Engine([])
        self.full, self.saved, self.warned = False, [], []  # type: ignore[var-annotated]
        self.step: int | None = None
        """Of the save that has begun."""
        self.hook = Saver(
            self.engine,  # type: ignore[arg-type]
            every,
            self,  # type: ignore[arg-type]
            lambda: self.engine.step,  # type: ignore[arg-type,return-value]
            last_step=9,
            background=background,
            report=self.report,
        )

    def report(self, text: str, style: str = "") -> None:
        if style:
            self.warned.append(text)

    def begin(self, engine: Any, info: int, *, background: bool) -> None:
        assert self.step is None, "two writers on one directory"
        self.step = info
        if self.full and not background:
            self.step = None
            raise TrainingError("full")

    @property
    def is_pending(self) -> bool:
        return self.step is not None

    def is_written(self) -> bool:
        return self.step is not None and self.engine.step >= self.step + 2

    def finish(self) -> Path | None:
        step, self.step = self.step, None
        if step is None:
            return None
        if self.full:
            raise TrainingError("full")
        self.saved.append(step)
        return Path(str(step))

    def steps(self, *steps: int) -> None:
        for step in steps:
            self.engine.step = step
            if self.hook.every and step % self.hook.every == 0:
                self.hook.run()
            self.hook.commit_if_written()


@pytest.mark.usefixtures("one_rank")
def test_a_save_in_the_background_is_complete_some_steps_later() -> None:
    saves = Saves(every=4, background=True)
    saves.steps(1, 2, 3, 4, 5)
    assert saves.saved == [] and saves.step == 4
    saves.steps(6)
    assert saves.saved == [4]
    saves.steps(7, 8)
    saves.hook.save_unless_saved()  # waits for the save under way
    assert saves.saved == [4, 8]
    saves.engine.step = 9
    saves.hook.save_unless_saved()
    assert saves.saved == [4, 8, 9]


@pytest.mark.usefixtures("one_rank")
def test_a_save_waits_for_the_one_before() -> None:
    saves = Saves(every=1, background=True)
    saves.steps(1, 2, 3)
    assert saves.saved == [1, 2] and saves.step == 3


@pytest.mark.usefixtures("one_rank")
def test_failures_in_the_background_are_counted() -> None:
    saves = Saves(every=2, background=True)
    saves.full = True
    saves.steps(1, 2, 3, 4, 5, 6, 7)
    assert saves.warned == ["full; training continues"] * 2
    with pytest.raises(TrainingError, match="full; 3 saves failed in a row"):
        saves.steps(8)
    saves = Saves(every=2, background=True)
    saves.full = True
    saves.steps(1, 2)
    saves.full = False
    saves.hook.save_unless_saved()
    assert saves.saved == [2]


def test_saves_when_it_is_time_and_once_per_step() -> None:
    saves = Saves(every=2)
    saves.steps(1, 2, 3, 4)
    saves.hook.save_unless_saved()
    assert saves.saved == [2, 4]
    never = Saves(every=0)
    never.steps(1, 2)
    assert never.saved == []
    never.hook.save_unless_saved()
    assert never.saved == [2]


def test_failures_are_counted_in_a_row() -> None:
    saves = Saves(every=1)
    saves.full = True
    saves.steps(*range(1, MAX_FAILED_SAVES))
    saves.full = False
    saves.steps(3)
    saves.full = True
    saves.steps(4, 5)
    assert len(saves.warned) == 4 and saves.saved == [3]
    with pytest.raises(TrainingError, match="full; 3 saves failed in a row"):
        saves.steps(6)


def test_the_last_save_must_succeed() -> None:
    saves = Saves(every=0)
    saves.full = True
    saves.steps(1)
    with pytest.raises(TrainingError, match="full"):
        saves.hook.save_unless_saved()


def test_finite_weights() -> None:
    model = torch.nn.Linear(2, 2)
    assert weights_are_finite(model)
    with torch.no_grad():
        model.bias[1] = math.inf
    assert not weights_are_finite(model)
