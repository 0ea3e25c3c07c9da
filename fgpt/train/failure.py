"""How a rank leaves a run: it says why, records it, tells the other ranks, and exits at once.

Destroying a process group, closing an engine or joining a data thread may wait for ranks that wait
for this one (NCCL does, for its timeout of 30 minutes); so a rank whose error the others do not
share does none of it. Only an error that all ranks raise together unwinds (`FgptError.agreed`).
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from fgpt.distributed.launch import World, lost_rank_reason, print_error
from fgpt.distributed.progress import IN_STEP, PREPARING, STARTING, Progress, describe
from fgpt.errors import BadBatchError, FgptError, LostRankError, TrainingError
from fgpt.train.failure_record import LOST_RANK, FailureRecord, append_failure
from fgpt.utils.deadlines import within

EXIT_BUG = 70
RANK0_GRACE_S = 5.0
"""Time for rank 0 to report an error and for its launcher to end the other ranks, in seconds."""
FILES_S = 3.0
"""Limit for reading and writing files before leaving, in seconds: a file system may hang."""
OUT_OF_MEMORY = (
    "-> make train_micro_batch_size_per_gpu smaller and gradient_accumulation_steps larger, add"
    ' "activation_checkpointing": {}, shard more (ds_configs/README.md), or choose a smaller model'
)
_BACKEND_REMEDIES = (
    ("shared memory", "give the container more of it (docker run --shm-size=8g, or --ipc=host)"),
    ("Duplicate GPU", "start at most one process per GPU"),
    (
        "out of memory",
        "leave more GPU memory free: a smaller micro-batch, or fewer processes on it",
    ),
)


@dataclass(frozen=True)
class Reason:
    """Why a rank leaves."""

    text: str
    exit_code: int
    traceback: bool = False
    """Whether the error is unforeseen, so that its traceback is printed."""


def reason_of(error: Exception) -> Reason:
    """Return what is said of an error, and this rank's exit code."""
    if isinstance(error, FgptError):
        return Reason(str(error), error.exit_code)
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return Reason(f"{text.splitlines()[0]} {OUT_OF_MEMORY}", TrainingError.exit_code)
    if isinstance(error, RuntimeError) and (lost := lost_rank_reason(error)):
        what = f"{LOST_RANK} or does not answer" if "time" in lost.lower() else LOST_RANK
        said = _last_error(text) if isinstance(error, dist.DistBackendError) else ""
        return Reason(f"{what} ({': '.join(filter(None, (lost, said)))})", LostRankError.exit_code)
    if isinstance(error, dist.DistBackendError) or "NCCL error" in text:
        return Reason(_backend_text(text), TrainingError.exit_code)
    if isinstance(error, torch.AcceleratorError) or text.startswith("CUDA error"):
        return Reason(text.splitlines()[0], TrainingError.exit_code, traceback=True)
    return Reason("this is a bug in FGPT", EXIT_BUG, traceback=True)


def _backend_text(text: str) -> str:
    """Return NCCL's own last error, with a remedy where one is known."""
    found = re.search(r"nccl\w+: .+", text)
    said = _last_error(text) or " ".join((found[0] if found else text).split())
    for sign, remedy in _BACKEND_REMEDIES:
        if sign.lower() in said.lower():
            return f"the communication of the ranks failed: {said} -> {remedy}"
    return f"the communication of the ranks failed: {said} -> NCCL_DEBUG=INFO says more"


def _last_error(text: str) -> str:
    """Return what NCCL says last, in one line."""
    found = re.search(r"Last error:\s*(.+)", text, re.DOTALL)
    return " ".join(found[1].split()) if found else ""


class FailureReport:
    """What this rank says when it leaves. The run fills in what it knows as it goes."""

    def __init__(self, world: World, progress: Progress, *, exits: bool):
        """`exits`: an error of this rank alone ends the process; else it is raised, for callers
        that run several runs in one process.
        """
        self.world, self.progress, self.exits = world, progress, exits
        self.run_dir: Path | None = None
        """Where failures are recorded."""
        self.newest: Callable[[], Path | None] = lambda: None
        """Returns the newest checkpoint, on this rank alone."""
        self.samples: Callable[[int], list[int]] | None = None
        """Returns the sample numbers of a step of training."""
        self.flush: Callable[[], None] = lambda: None
        """Writes pending records."""
        self.tell: Callable[[str], None] = lambda reason: None
        """Has the other ranks leave."""
        self.verdict: Callable[[], str | None] = lambda: None
        """Returns why another rank left, if that rank said so."""
        self._is_late = False
        """Whether the error may be of the step before: a device reports its errors late."""
        self._reported: BaseException | None = None
        self._depth = 0
        """Of nested `reporting` contexts: an error is reported in the innermost."""
        self._leaving = threading.Lock()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Report an error that leaves the context, and exit unless all ranks have raised it."""
        self._depth += 1
        try:
            yield
        except Exception as error:
            if error is self._reported:
                raise
            self._reported = error
            reason = reason_of(error)
            is_lost = LOST_RANK in reason.text
            self._report(error, reason, is_lost)
            if is_lost and not isinstance(error, LostRankError):
                self._reported = LostRankError(self._lost_text(reason.text))
                raise self._reported from error
            raise
        finally:
            self._depth -= 1
            if not self._depth:
                self._reported = None  # its traceback keeps the run's objects alive

    def is_agreed(self, error: BaseException) -> bool:
        """Whether all ranks raised this error, so that they can clean up together."""
        return self.world.size == 1 or (isinstance(error, FgptError) and error.agreed)

    def _report(self, error: Exception, reason: Reason, is_lost: bool) -> None:
        # one process that trains leaves like one of several: with step, samples and checkpoint
        is_own = self.world.size == 1 and self.samples is not None
        alone = not self.is_agreed(error) or (is_own and not getattr(error, "agreed", False))
        self._is_late = isinstance(error, torch.AcceleratorError)
        if alone and self.exits:
            lost = (self.verdict() or reason.text) if is_lost else None
            self._leave_once()
            if lost is not None:
                self._exit(self._lost_text(lost), reason.exit_code, recorded=lost)
            is_start = self.progress.phase in (STARTING, PREPARING)
            if is_start and isinstance(error, FgptError) and not self.world.is_rank0:
                let_rank0_report()
            if reason.traceback:
                within(FILES_S, lambda: traceback.print_exception(error), None)
            cause = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
            said = cause if reason.traceback else reason.text.splitlines()[0]
            self._exit(
                f"{reason.text}{self._facts()}",
                reason.exit_code,
                tell=f"{LOST_RANK} (rank {self.world.rank}: {said})",
                recorded=said,
            )
        elif self.world.is_rank0 or alone:
            bad = error if isinstance(error, BadBatchError) else None
            self._record(reason.text.splitlines()[0], reason.exit_code, bad)

    def leave(self, reason: str) -> NoReturn:
        """Exit because of another rank; called by threads while the main thread may hang."""
        self._leave_once()
        self._exit(self._lost_text(reason), LostRankError.exit_code, recorded=reason)

    def end(self, text: str, exit_code: int) -> NoReturn:
        """Exit at once with one line; called by threads while the main thread may hang."""
        self._leave_once()
        self._exit(f"{text}{self._facts()}", exit_code, tell=f"{LOST_RANK} ({text})")

    def _leave_once(self) -> None:
        """Return in the first thread that leaves; the others wait for the exit."""
        if not self._leaving.acquire(blocking=False):
            time.sleep(10 * FILES_S)

    def _exit(self, text: str, exit_code: int, *, tell: str = "", recorded: str = "") -> NoReturn:
        try:
            # the cause first; any of this may hang or fail, also a pipe whose reader stands still
            within(FILES_S, lambda: print_error(self.world.rank, text), None)
            self._record(recorded or text, exit_code)
            within(FILES_S, self.flush, None)
            if tell:
                within(FILES_S, lambda: self.tell(tell), None)
            within(FILES_S, sys.stdout.flush, None)
            within(FILES_S, sys.stderr.flush, None)
        finally:
            os._exit(exit_code)

    def _lost_text(self, reason: str) -> str:
        if reason.startswith("after step "):
            return reason
        return (
            f"after step {self.progress.step}: {reason}; newest checkpoint:"
            f" {self._newest() or 'none'}; continue with --resume auto"
        )

    def _facts(self) -> str:
        """Step, phase, samples and newest checkpoint, where the run has got that far."""
        progress = self.progress
        if self.samples is None:
            return f" ({progress.phase})"
        samples = self._samples_in_flight()
        read = f", samples {min(samples)} to {max(samples)}" if samples else ""
        return (
            f" ({describe(progress.phase, progress.step)}{read}; newest checkpoint:"
            f" {self._newest() or 'none'})"
        )

    def _newest(self) -> Path | None:
        return within(FILES_S, self.newest, None)

    def _samples_in_flight(self) -> list[int] | None:
        if self.samples is None or self.progress.phase not in IN_STEP:
            return None
        step = self.progress.step
        steps = (step - 1, step) if self._is_late and step > 0 else (step,)
        return [number for each in steps for number in self.samples(each)]

    def _record(self, error: str, exit_code: int, bad: BadBatchError | None = None) -> None:
        """Add a line to the run's failures; `bad`: about the batch before the one in flight."""
        if (run_dir := self.run_dir) is None:
            return
        samples = bad.samples if bad else self._samples_in_flight()
        newest = self._newest()
        record = FailureRecord(
            time=time.time(),
            rank=self.world.rank,
            step=bad.step if bad else self.progress.step,
            phase=self.progress.phase,
            error=error,
            exit_code=exit_code,
            samples=None if samples is None else tuple(samples),
            checkpoint=None if newest is None else str(newest),
        )
        within(FILES_S, lambda: append_failure(run_dir, record), None)


def let_rank0_report(wait_s: float = RANK0_GRACE_S) -> None:
    """Wait for the launcher to end this rank, because most errors of the start occur on all ranks.

    A rank that is still alive afterwards has an error that rank 0 has not, and reports it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(wait_s)
