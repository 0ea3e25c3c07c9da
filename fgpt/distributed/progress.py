"""Where this rank is in its run: the phase, the step, and when it last made progress."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import fgpt

PREPARING: Final = "preparing data"
STARTING: Final = "starting"
FIRST_STEP: Final = "first step"
DATA: Final = "reading data"
STEP: Final = "training step"
SAVING: Final = "saving"
EVALUATION: Final = "evaluation"
SAMPLING: Final = "decoding"

PACKAGE = Path(fgpt.__file__).parent
IN_STEP: Final = (FIRST_STEP, DATA, STEP)
"""Phases with a batch in flight."""

LONG_FACTOR: Final = 6
"""Phases that may compile, copy the state or run without a step are allowed this many limits."""
SLOW_STEP_FACTOR: Final = 3
"""A step may take this many times as long as the longest one so far, whatever the limit is."""


def describe(phase: str, step: int) -> str:
    """Name a phase after `step` finished steps, for messages."""
    return f"step {step + 1}, {phase}" if phase in IN_STEP else f"{phase} after step {step}"


class Progress:
    """The phase of this rank, written by its main thread and read by the watchdog's.

    All ranks enter the same phases in the same order, so that their `ticks` are comparable: a rank
    with fewer ticks than the others is the one they wait for.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """`clock` returns seconds."""
        self._clock = clock
        self.phase: str = STARTING
        self.step = 0
        """Optimizer steps that are done."""
        self.ticks = 0
        """Number of times that this rank made progress."""
        self.since_s = clock()
        """Time of the latest progress."""
        self.batch_size = 1
        """Samples of the step under way; a batch that grows (`train.batch_ramp`) takes longer."""
        self._longest_sample_s = 0.0
        """Seconds per sample of the slowest step; of the first one, until a second is done."""
        self._has_stepped = False
        """Whether the first step, and with it the first reading of data, is done."""
        self._is_steady = False
        """Whether a step after the first one is done."""
        self._main = threading.main_thread().ident

    def enter(self, phase: str, step: int | None = None) -> None:
        """Begin `phase`; `step`: the number of steps that are done, if it has changed."""
        now = self._clock()
        if self.phase in (FIRST_STEP, STEP):
            sample_s = (now - self.since_s) / self.batch_size
            is_second = self.phase == STEP and not self._is_steady  # the first one also compiles
            self._longest_sample_s = (
                sample_s if is_second else max(self._longest_sample_s, sample_s)
            )
            self._has_stepped, self._is_steady = True, self.phase == STEP
        self.phase = phase
        if step is not None:
            self.step = step
        self.ticks += 1
        self.since_s = now

    def tick(self) -> None:
        """Note progress within a phase, such as one batch of an evaluation."""
        self.enter(self.phase)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, this rank is in `phase`, then in the one before; an error leaves it there."""
        before = self.phase
        self.enter(phase)
        yield
        self.enter(before)

    def restart_clock(self) -> None:
        """Count the time of this phase from now: the process was stopped for a while."""
        self.since_s = self._clock()

    def age_s(self) -> float:
        """Seconds since the latest progress."""
        return self._clock() - self.since_s

    def limit_s(self, watchdog_s: float) -> float:
        """Seconds that the phase may last without progress, where a step may last `watchdog_s`."""
        if self.phase == PREPARING:
            return math.inf  # tokenizing a large corpus takes hours on rank 0
        if self.phase in (DATA, STEP) and self._has_stepped:
            return max(watchdog_s, self._slow_step_s())
        # a batch of an evaluation has as many samples as a step
        return max(LONG_FACTOR * watchdog_s, self._slow_step_s())

    def stop_limit_s(self, grace_s: float) -> float:
        """Seconds without progress after a request to stop: `grace_s`, and what the phase takes.

        `grace_s` 0: as long as it takes.
        """
        if not grace_s:
            return math.inf
        if self.phase == SAVING:
            return LONG_FACTOR * grace_s
        return max(grace_s, self._slow_step_s())

    def _slow_step_s(self) -> float:
        """Seconds that a step of this size may take, by the slowest one so far."""
        return SLOW_STEP_FACTOR * self._longest_sample_s * self.batch_size

    def place(self) -> tuple[str, bool]:
        """Where the main thread is, `file.py:12 function`, and whether it waits for other ranks."""
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return "", False
        waits, here = False, frame
        while here is not None and here.f_back is not None:
            file = here.f_code.co_filename
            if "torch/distributed/" in file.replace("\\", "/"):
                waits = True
            elif Path(file).is_relative_to(PACKAGE):
                break
            here = here.f_back
        code = here.f_code
        return f"{Path(code.co_filename).name}:{here.f_lineno} {code.co_name}", waits
