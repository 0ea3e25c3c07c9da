"""Starts a run again after a failure, on one node (`fgpt train`).

After each end of the command, until one of these holds:

    finished        exit code 0, and a checkpoint of the last step
    asked to stop   a signal to this process, or exit code 129, 130 or 143
    bad input       exit code 2, of the command or of the rank that failed first, before a start
                    has taken the run directory, or again after the same step
    no restarts     as many as allowed have been made
    repeated fault  the second in a row after the same step and with the same newest checkpoint;
                    unless the batch may be left out

A start that fails before it has taken the directory of a run that has trained is no such fault: a
port, a device or a file system may be back a little later, so each start waits longer than the one
before. What has trained once had the right input, so that exit code 2 may mean a file system, too.
Launchers change exit codes, so the record of a rank counts (`failure_record`); a run
whose ranks were all killed is known by the last line of its metrics.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

from fgpt.config.field_syntax import Ranges, joined_ranges, ranges_text
from fgpt.distributed.progress import IN_STEP, STEP
from fgpt.errors import UserError
from fgpt.train.failure_record import FailureRecord, cause, read_failures
from fgpt.train.run_progress import RunProgress
from fgpt.utils.files import read_regular, write_atomic
from fgpt.utils.process_tree import ProcessTree

REPORT = "supervisor.json"
"""File of the run directory: the faults, and the batches that are left out."""
POLL_S = 0.2
LEFTOVER_GRACE_S = 10.0
"""Time for ranks to end by themselves after their launcher has failed, in seconds."""
REPEATED_SIGNAL_S = 1.0
"""Signals that follow the first one within this time, in seconds, are the same request."""
LONGEST_PAUSE_S = 60.0
"""Before a restart, in seconds; doubled from 1 with each start that finishes no step."""
STOPPED = tuple(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
BAD_INPUT = UserError.exit_code
STOP_TEXT = "stopped; continue with --resume auto"


@dataclass(frozen=True)
class SupervisedRun:
    """What to start."""

    run_dir: Path
    """The run's directory."""
    command: Callable[[bool, Ranges], Sequence[str]]
    """Returns the command, given whether it continues from the newest checkpoint of `run_dir`, and
    the samples to leave out besides those of the user."""
    max_restarts: int
    """Starts after the first one."""
    max_skipped_batches: int = 0
    """Batches that may be left out, those of earlier supervisors of the run included."""
    resumes: bool = False
    """Whether the first start continues the run in `run_dir`, if there is one."""


@dataclass(frozen=True)
class Fault:
    """One failure of the command."""

    time: float
    """When it happened, in seconds since 1970."""
    step: int
    """The last finished step."""
    checkpoint: int | None
    """Step of the newest checkpoint; None: there is none."""
    exit_code: int
    """Of the command."""
    record: FailureRecord | None
    """Of the rank that failed first; None: no rank recorded a failure."""

    def is_same_as(self, other: Fault | None) -> bool:
        """Whether both came after one step and in one phase, without a checkpoint in between."""
        if other is None:
            return False
        here = (self.step, self.checkpoint, self.phase)
        return here == (other.step, other.checkpoint, other.phase)

    @property
    def phase(self) -> str:
        """Where it failed; a rank that was killed is taken to have been in a step."""
        is_in_step = self.record is None or self.record.phase in IN_STEP
        return STEP if self.record is None or is_in_step else self.record.phase

    @property
    def samples(self) -> Ranges:
        """The samples of the batch in flight; (): unknown, or there was none."""
        numbers = () if self.record is None else self.record.samples or ()
        return joined_ranges((number, number) for number in numbers)

    def __str__(self) -> str:
        text = f"failed after step {self.step}, exit code {self.exit_code}"
        if self.record is None:
            return f"{text}, and no rank recorded why"
        samples = f", samples {ranges_text(self.samples)}" if self.samples else ""
        who = f"rank {self.record.rank}"
        if self.record.is_consequence:  # the rank that was killed could record nothing
            who = f"noticed by {who}"
        return f"{text}: {who}, {self.record.phase}{samples}: {self.record.error}"


class Supervisor:
    """Runs one command until it is finished, or a further start would not help."""

    def __init__(self, job: SupervisedRun, report: Callable[[str], None]):
        """`report` prints one line."""
        self.job, self.report = job, report
        self.progress = RunProgress(job.run_dir)
        self.began = time.time()
        self.restarts = 0
        self.lost_steps = 0
        self.recovery_s: list[float] = []
        self.faults: list[Fault] = []
        self.skipped_batches: list[dict[str, Any]] = []
        self._is_claimed = False
        """Whether a start has taken the run directory: the run in it is this one."""
        self._open: Fault | None = None
        """The first fault since the last finished step; `step` is the furthest of all since."""
        self._previous: Fault | None = None
        """The fault before; None after a batch was left out."""
        self._fruitless_starts = 0
        """Starts in a row that have finished no step."""
        self._signals: list[tuple[int, float]] = []

    def run(self) -> int:
        """Run the command to its end; returns the exit code. Raises UserError."""
        if self.job.resumes:
            self.skipped_batches = _read_skipped_batches(self.job.run_dir)
        with _recorded_signals() as self._signals:
            while (code := self._start_once()) is None:
                self._pause()
                if self._signals:
                    self.report(STOP_TEXT)
                    code = 128 + self._signals[0][0]
                    break
                self.restarts += 1
        self._summarize()
        return code

    def _start_once(self) -> int | None:
        """Run the command once; returns the exit code of the run, None to start again."""
        # 1. run it, and leave no process of it
        started, claim = time.time(), self.progress.claim()
        skipped = joined_ranges(r for batch in self.skipped_batches for r in batch["samples"])
        command = self.job.command(self._is_claimed, skipped)
        try:
            tree = ProcessTree(command)
        except OSError as error:
            raise UserError(f"{command[0]}: {error.strerror}: check the launch command") from error
        try:
            code = self._wait(tree, started)
        finally:
            tree.kill()
        is_start_claimed = self.progress.claim() != claim
        was_claimed, self._is_claimed = self._is_claimed, self._is_claimed or is_start_claimed
        self._fruitless_starts += 1
        # 2. stopped or finished
        if self._signals:
            code = 128 + self._signals[0][0]
        if code in STOPPED:
            self.report(STOP_TEXT)
            return code
        if code == 0 and self._is_complete(is_start_claimed):
            return 0
        # 3. failed: what happened, and whether to start again
        fault = self._fault(code, started)
        self.faults.append(fault)
        first = self._open or fault
        self._open = Fault(
            first.time, max(first.step, fault.step), fault.checkpoint, code, first.record
        )
        end = self._reason_to_end(fault, is_in_start=was_claimed and not is_start_claimed)
        self._write_report()
        if end is not None:
            exit_code, why = end
            self.report(f"gave up, {why}: {fault}")
            return exit_code
        source = f"step {fault.checkpoint}" if fault.checkpoint is not None else "the beginning"
        self.report(
            f"{fault}; restart {self.restarts + 1} of {self.job.max_restarts} from {source}"
        )
        return None

    def _wait(self, tree: ProcessTree, started: float) -> int:
        """Wait for the command and all of its processes; returns the command's exit code.

        The first signal to this process is passed on, the second one kills.
        """
        code: int | None = None
        is_passed_on, deadline = False, 0.0
        while True:
            if code is None and (code := tree.wait(POLL_S)) is not None:
                deadline = time.monotonic() + LEFTOVER_GRACE_S
            self._note_recovery(started)
            if self._signals and not is_passed_on:
                tree.send(self._signals[0][0])
                is_passed_on = True
            if len(self._signals) > 1:
                tree.kill()
            if code is None:
                continue
            if not tree.alive():
                return code
            # ranks may be saving: a stop has the time it needs, a failure the grace
            if not self._signals and time.monotonic() > deadline:
                return code
            time.sleep(POLL_S)

    def _is_complete(self, is_start_claimed: bool) -> bool:
        """Whether a command that ended with 0 has trained to the end: `deepspeed` also ends with 0
        when its own child is killed, and then this start may not have come to the run directory.
        """
        planned = self.progress.planned_steps() if is_start_claimed else None
        newest = self.progress.newest_checkpoint() or 0
        return is_start_claimed and (planned is None or newest >= planned)

    def _fault(self, code: int, started: float) -> Fault:
        record = cause(read_failures(self.job.run_dir, since=started))
        step = self.progress.last_step() if self._is_claimed else 0
        return Fault(
            time=time.time() if record is None else record.time,
            step=max(step, 0 if record is None else record.step),
            checkpoint=self.progress.newest_checkpoint() if self._is_claimed else None,
            exit_code=code,
            record=record,
        )

    def _reason_to_end(self, fault: Fault, is_in_start: bool) -> tuple[int, str] | None:
        """An exit code, and why not to start again; None: start, now without the batch if the fault
        has repeated and it may be left out.

        `is_in_start`: the run has trained before, and this start did not get to its directory.
        """
        is_bad_input = BAD_INPUT in (fault.exit_code, fault.record and fault.record.exit_code)
        is_repeated = not is_in_start and fault.is_same_as(self._previous)
        if is_bad_input and (is_repeated or not self._is_claimed):
            return BAD_INPUT, "the input is wrong"
        if self.restarts >= self.job.max_restarts:
            return 1, f"after {self.restarts} restarts (--max-restarts)"
        if is_in_start:
            return None
        self._previous = fault
        if not is_repeated:
            return None
        left = self.job.max_skipped_batches - len(self.skipped_batches)
        if not fault.samples or left <= 0:
            hint = ", --skip_bad_batches would leave the samples out" if fault.samples else ""
            return 1, f"a restart does not help{hint}"
        self._previous = None  # the next fault is of another batch
        samples = [list(each) for each in fault.samples]
        self.skipped_batches.append({"time": fault.time, "step": fault.step, "samples": samples})
        self.report(f"failed twice after step {fault.step}: leaving out samples {_text(samples)}")
        return None

    def _pause(self) -> None:
        """Wait before a restart, longer with each start that has finished no step."""
        pause_s = min(LONGEST_PAUSE_S, 2.0 ** (self._fruitless_starts - 2))
        deadline = time.monotonic() + (pause_s if self._fruitless_starts > 1 else 0.0)
        while time.monotonic() < deadline and not self._signals:
            time.sleep(POLL_S)

    def _note_recovery(self, started: float) -> None:
        """After a fault, count what was lost once the first step of this start has finished."""
        if (first := self.progress.first_since(started)) is None:
            return
        self._fruitless_starts = 0
        if self._open is None:
            return
        fault, self._open = self._open, None
        step, ended = first
        lost, recovery_s = max(0, fault.step - (step - 1)), max(0.0, ended - fault.time)
        self.lost_steps += lost
        self.recovery_s.append(recovery_s)
        self.report(
            f"recovered: {lost} steps lost, {recovery_s:.1f} s from the failure to the end of step"
            f" {step}"
        )

    def _summarize(self) -> None:
        """Print and record the whole."""
        if self._open is not None:  # no step has followed
            self.lost_steps += self._open.step - (self._open.checkpoint or 0)
        self._write_report()
        recovery = f", {fmean(self.recovery_s):.1f} s to recover" if self.recovery_s else ""
        self.report(
            f"restarts: {self.restarts}, steps lost: {self.lost_steps}{recovery}, goodput"
            f" {self._goodput():.1%} (time of the steps kept / time since the first start)"
        )

    def _goodput(self) -> float:
        useful_s = self.progress.step_s_since(self.began) if self._is_claimed else 0.0
        return useful_s / max(1e-9, time.time() - self.began)

    def _write_report(self) -> None:
        """Write supervisor.json: again after each start, which may have moved the directory."""
        if not self._is_claimed:
            return
        report = {
            "restarts": self.restarts,
            "lost_steps": self.lost_steps,
            "recovery_s": self.recovery_s,
            "goodput": self._goodput(),
            "skipped_batches": self.skipped_batches,
            "faults": [asdict(fault) for fault in self.faults],
        }
        with contextlib.suppress(OSError):  # a full disk; the run is more important
            if self.job.run_dir.is_dir():
                write_atomic(self.job.run_dir / REPORT, json.dumps(report, indent=1).encode())


def _read_skipped_batches(run_dir: Path) -> list[dict[str, Any]]:
    """The batches that an earlier supervisor of the run has left out."""
    try:
        batches = json.loads(read_regular(run_dir / REPORT))["skipped_batches"]
        if not isinstance(batches, list):
            raise TypeError("skipped_batches is no list")
        for batch in batches:
            for first, last in batch["samples"]:
                if (
                    type(first) is not int
                    or type(last) is not int
                    or not 0 <= first <= last < 2**62
                ):
                    raise ValueError(f"{first} to {last} are no sample numbers")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{run_dir / REPORT}: cannot be read ({error}): repair it, or move it away and name the"
            " samples to leave out with --set data.skip_samples=..."
        ) from error
    return batches


def _text(samples: Sequence[Sequence[int]]) -> str:
    return str(ranges_text(samples))


@contextlib.contextmanager
def _recorded_signals() -> Iterator[list[tuple[int, float]]]:
    """Inside, SIGTERM, SIGINT and SIGHUP are kept with their times instead of ending the process.

    SIGHUP stays ignored under nohup. One request has often several signals: schedulers signal each
    process and its group.
    """
    received: list[tuple[int, float]] = []

    def record(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not received or now - received[-1][1] > REPEATED_SIGNAL_S:
            received.append((number, now))

    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, record)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
