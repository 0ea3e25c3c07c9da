"""The run of `fgpt soak` that faults happen to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from fgpt.checkpoint.directory import CheckpointDirectory, step_of
from fgpt.checkpoint.manifest import FILE as MANIFEST
from fgpt.errors import TrainingError
from fgpt.parity.soak_faults import PlannedFault
from fgpt.parity.soak_run import SAVE_EVERY, Outcome, Segment, Soak, SoakRecord, Trainer
from fgpt.train.run_progress import RunProgress

POLL_S = 0.03
SEARCH_EVERY_S = 0.3
"""A search for the ranks reads the environment of every process of the machine."""
END_LIMIT_S = 90.0
"""Time for all processes to end after a fault: a rank may be stopped while it saves."""
START_LIMIT_S = 300.0
"""Time from a start to its first step."""
MAX_UNPLANNED = 3
"""Ends without a planned fault after which a soak gives up."""


class FaultyRun:
    """Trains the run with faults to its end."""

    def __init__(self, soak: Soak, trainer: Trainer, say: Callable[[Outcome], None]):
        """`say` is called once what came of a fault is known."""
        self.soak, self.trainer, self.say = soak, trainer, say
        self.record = SoakRecord()
        run_dir = trainer.run_dir("faulty")
        self.progress = RunProgress(run_dir)
        self.checkpoints = CheckpointDirectory(run_dir / "checkpoints")
        self.waiting = list(soak.faults)
        self._open: Outcome | None = None
        """The fault that ended the start before, until the next step is finished."""
        self._flipped: Path | None = None
        """The checkpoint that must not be used."""
        self._expected = 0
        """The step that this start must continue from."""

    def train(self) -> SoakRecord:
        """Start, disturb and restart until the last step. Raises TrainingError."""
        began, unplanned = time.time(), 0
        while (self.progress.newest_checkpoint() or 0) < self.soak.steps:
            layout = self.soak.layouts[self.record.starts % len(self.soak.layouts)]
            if time.time() - began > self.soak.limit_s:
                self.waiting.clear()
            start = _Start(self, layout)
            if not start.run():
                unplanned += 1
            self.record.starts += 1
            if unplanned > MAX_UNPLANNED:
                log = self.trainer.log("faulty", self.record.starts - 1).read_text()
                raise TrainingError(f"the run ends without a fault:\n{log[-3000:]}")
        self.record.wall_s = time.time() - began
        self.record.useful_s = self.progress.step_s_since(0)
        return self.record

    def intact(self) -> list[Path]:
        """Return the complete checkpoints that were not damaged, newest first."""
        found = self.checkpoints.complete()
        return [path for path in found if (path / MANIFEST).exists() and path != self._flipped]

    def close_open(self, layout: str, first: tuple[int, float] | None) -> None:
        """Note what became of the fault before; `first`: step and time of the first step after."""
        outcome, expected = self._open, self._expected
        if first is not None:
            self.record.add_segment(Segment(layout, first[0] - 1))
        if outcome is None:
            return
        self._open = None
        if first is not None:
            outcome.resumed_step, outcome.recovery_s = first[0] - 1, first[1] - outcome.time
            self._flipped = None  # the resumed run has renamed it
            if outcome.resumed_step != expected:
                resumed = f"resumed from step {first[0] - 1}, not {expected}"
                outcome.problem = outcome.problem or resumed
        self.say(outcome)

    def begin_start(self) -> int:
        """Return the step that the next start must continue from."""
        self._expected = max(map(step_of, self.intact()), default=0)
        return self._expected

    def add(self, outcome: Outcome, *, ends_run: bool) -> None:
        """Record a fault."""
        self.record.outcomes.append(outcome)
        if ends_run:
            self._open = outcome
        else:
            self.say(outcome)

    def flip_byte(self) -> None:
        """Change one byte in the middle of a file of the newest checkpoint."""
        self._flipped = self.intact()[0]
        file = max(self._flipped.glob("rank_*.safetensors"), key=lambda path: path.stat().st_size)
        with file.open("r+b") as opened:
            opened.seek(file.stat().st_size // 2)
            byte = opened.read(1)[0]
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte ^ 1]))


class _Start:
    """One start of the launcher, until its last process is gone."""

    def __init__(self, run: FaultyRun, layout: str):
        self.faulty, self.layout = run, layout
        # 1. faults up to the first that ends the run; the others happen in passing
        begin = at = run.begin_start()
        self.passing: list[tuple[PlannedFault, int]] = []
        """With their steps."""
        self.ending: PlannedFault | None = None
        planned = []
        while run.waiting and self.ending is None:
            fault = run.waiting.pop(0)
            at = fault.at_step(at, SAVE_EVERY)
            if fault.kind.ends_run:
                self.ending = fault
            else:
                self.passing.append((fault, at))
            if fault.is_planned_in_rank:
                planned.append(fault.variable(at))
        self.begin, self.target = begin, at
        # 2. start
        self.began = time.time()
        number, steps = run.record.starts, run.soak.steps
        segments = [(layout, steps)]
        self.tree = run.trainer.start("faulty", number, segments, ",".join(planned))
        self.ranks: dict[int, psutil.Process] = {}
        self._search_s = 0.0
        """When the ranks are searched for again (time.monotonic)."""
        self.first: tuple[int, float] | None = None
        """Step and time of the first finished step."""
        self.struck_s: float | None = None
        """When the ending fault happened (time.monotonic)."""
        self.struck = 0.0
        """The same in seconds since 1970."""

    def run(self) -> bool:
        """Wait for the end; returns whether it was that of the run, or of the planned fault."""
        try:
            code, gone_s, outlived_s, problem = self._wait()
        finally:
            self.tree.kill()
        run = self.faulty
        self._note_first()
        if self.first is None:
            run.close_open(self.layout, None)
        self._note_passing()
        if code == 0 and self.ending is None:
            return True
        is_planned = self.struck_s is not None
        name = self.ending.name if is_planned and self.ending else "an end without a fault"
        outcome = Outcome(name, self.layout, run.progress.last_step(), self.struck or time.time())
        outcome.gone_s, outcome.outlived_s, outcome.problem = gone_s, outlived_s, problem
        if not is_planned:
            last_line = _last_line(run.trainer, run.record.starts)
            outcome.problem = f"{problem or f'exit code {code}'}: {last_line}"
        run.add(outcome, ends_run=True)
        if is_planned and self.ending and self.ending.kind.flips_byte:
            run.flip_byte()
        return is_planned

    def _wait(self) -> tuple[int | None, float | None, float | None, str]:
        """Wait until all processes are gone, and let the fault happen; returns the launcher's exit
        code, the times of `Outcome`, and what went wrong.
        """
        code: int | None = None
        launcher_end_s = 0.0
        began_s = time.monotonic()
        while True:
            if code is None and (code := self.tree.wait(POLL_S)) is not None:
                launcher_end_s = time.monotonic()
            elif code is not None:
                time.sleep(POLL_S)
            self._find_ranks()
            self._note_first()
            self._strike()
            now = time.monotonic()
            if code is not None and not self.tree.alive():
                gone_s = None if self.struck_s is None else now - self.struck_s
                return code, gone_s, now - launcher_end_s, ""
            since = self.struck_s or (launcher_end_s if code is not None else 0.0)
            if since and now - since > END_LIMIT_S:
                left = len(self.tree.alive())
                return code, now - since, None, f"{left} processes left after {END_LIMIT_S:.0f} s"
            if self.first is None and now - began_s > START_LIMIT_S:
                return code, None, None, f"no step within {START_LIMIT_S:.0f} s"

    def _find_ranks(self) -> None:
        now = time.monotonic()
        if len(self.ranks) == self.faulty.soak.ranks or now < self._search_s:
            return
        self._search_s = now + SEARCH_EVERY_S
        for process in self.tree.alive():
            with suppress(psutil.Error, KeyError):
                self.ranks[int(process.environ()["RANK"])] = process

    def _note_first(self) -> None:
        if self.first is None and (first := self.faulty.progress.first_since(self.began)):
            self.first = first
            self.faulty.close_open(self.layout, first)

    def _strike(self) -> None:
        """Do the fault that ends the run when its step has come, or notice that a rank did it."""
        fault = self.ending
        if fault is None or self.struck_s is not None or self.first is None:
            return
        if fault.is_planned_in_rank:
            if fault.rank in self.ranks and not _is_alive(self.ranks[fault.rank]):
                self._note_strike()
        elif self.faulty.progress.last_step() >= self.target:
            if fault.kind.flips_byte and len(self.faulty.intact()) < 2:
                return
            if fault.kind.target == "rank" and fault.rank not in self.ranks:
                return  # not found yet
            self._note_strike()
            self._act(fault)

    def _note_strike(self) -> None:
        self.struck_s, self.struck = time.monotonic(), time.time()

    def _act(self, fault: PlannedFault) -> None:
        number, ranks = fault.kind.signal, list(self.ranks.values())
        if fault.kind.target == "rank":
            ranks = [self.ranks[fault.rank]]
        if fault.kind.target != "rank":
            self.tree.send(number)
        if fault.kind.target != "launcher":
            for process in ranks:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def _note_passing(self) -> None:
        """Record the faults that the run has survived, by what it said."""
        run = self.faulty
        text = run.trainer.log("faulty", run.record.starts).read_text()
        for fault, step in self.passing:
            outcome = Outcome(fault.name, self.layout, step)
            said = "is saved; " if fault.point == "before_latest" else "checkpoint not saved"
            if f"injected fault at {fault.point}" not in text or said not in text:
                outcome.problem = "no rank said so"
            run.add(outcome, ends_run=False)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _last_line(trainer: Trainer, number: int) -> str:
    lines = trainer.log("faulty", number).read_text().split("\n")
    return next((line for line in reversed(lines) if line.startswith("fgpt: ")), lines[-1])
