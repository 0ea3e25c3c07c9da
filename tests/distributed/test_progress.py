"""Phases, their limits, and where the main thread is."""

from __future__ import annotations

import math

import pytest

from fgpt.distributed.progress import (
    DATA,
    EVALUATION,
    FIRST_STEP,
    PREPARING,
    SAVING,
    STEP,
    Progress,
)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_limits() -> None:
    clock = Clock()
    progress = Progress(clock)
    assert progress.limit_s(10) == 60  # starting
    progress.enter(PREPARING)
    assert progress.limit_s(10) == math.inf
    progress.enter(DATA, 4)
    progress.enter(FIRST_STEP)
    clock.now_s += 50
    assert (progress.age_s(), progress.limit_s(10), progress.step) == (50, 60, 4)
    progress.enter(DATA, 5)
    assert progress.limit_s(10) == 150  # no other step is known; this one may have compiled
    progress.enter(STEP)
    clock.now_s += 8
    progress.enter(DATA, 6)
    assert progress.limit_s(10) == 24 and progress.age_s() == 0
    progress.batch_size = 5  # the batch grows
    assert progress.limit_s(10) == 120
    progress.batch_size = 1
    # after a request to stop
    assert (progress.stop_limit_s(10), progress.stop_limit_s(30)) == (24, 30)
    progress.enter(SAVING)
    assert progress.stop_limit_s(10) == 60 and progress.stop_limit_s(0) == math.inf


def test_the_first_data_may_take_as_long_as_the_first_step() -> None:
    progress = Progress(Clock())
    progress.enter(DATA, 400)
    assert progress.limit_s(10) == 60


def test_a_phase_within_another() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress.enter(STEP, 3)
    with progress.during(EVALUATION):
        ticks = progress.ticks
        clock.now_s += 5
        progress.tick()
        assert (progress.phase, progress.ticks, progress.age_s()) == (EVALUATION, ticks + 1, 0)
    assert progress.phase == STEP
    with pytest.raises(ValueError), progress.during(EVALUATION):
        raise ValueError
    assert progress.phase == EVALUATION  # where the error occurred


def test_the_clock_starts_again_after_a_stop() -> None:
    clock = Clock()
    progress = Progress(clock)
    ticks = progress.ticks
    clock.now_s += 1000
    progress.restart_clock()
    assert (progress.age_s(), progress.ticks) == (0, ticks)


def test_the_place_is_in_this_file() -> None:
    place, waits = Progress().place()
    assert place.startswith("test_progress.py:") or place.startswith("progress.py:")
    assert not waits
