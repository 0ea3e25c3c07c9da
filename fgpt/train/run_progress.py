"""How far a run has come, by the files in its directory; needs no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fgpt.report.run_record import CONFIG, METRICS, read_metrics
from fgpt.utils.files import open_regular, read_regular

TAIL_BYTES = 2**16
"""The end of metrics.jsonl that is read while a run goes on: at least a hundred steps."""


class RunProgress:
    """The files of a run directory. What cannot be read counts as absent."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def claim(self) -> tuple[int, int] | None:
        """Return what is another value after a run has taken the directory, which it does right
        before training; None: no run ever did.
        """
        try:
            stat = os.stat(self.run_dir / CONFIG)
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def last_step(self) -> int:
        """Return the last finished step that is recorded; 0: none is."""
        return max((record["step"] for record in self._last_records()), default=0)

    def first_since(self, time: float) -> tuple[int, float] | None:
        """Return (step, time of its end) of the first step that ended at `time` or later, in
        seconds since 1970; None: there is none yet.
        """
        steps = ((record["step"], record["time"]) for record in self._last_records())
        return min((step for step in steps if step[1] >= time), default=None)

    def step_s_since(self, time: float) -> float:
        """Return the total time of the steps that ended at `time` or later, in seconds."""
        try:
            steps = read_metrics(self.run_dir / METRICS).steps
        except OSError:
            return 0.0
        return sum(record["step_s"] for record in steps if _time(record) >= time)

    def newest_checkpoint(self) -> int | None:
        """Return the step of the newest checkpoint, not verified; None: there is none."""
        names = (path.name for path in self.run_dir.glob("checkpoints/step_*/"))
        steps = (name.removeprefix("step_") for name in names)
        return max((int(step) for step in steps if step.isdecimal()), default=None)

    def planned_steps(self) -> int | None:
        """Return the step that the run trains to; None: unknown."""
        try:
            steps = json.loads(read_regular(self.run_dir / CONFIG))["run"]["train"]["steps"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return steps if type(steps) is int else None

    def _last_records(self) -> list[dict[str, Any]]:
        """The last records of steps, each with its step and time."""
        try:
            with open_regular(self.run_dir / METRICS) as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                lines = file.read().splitlines()
        except OSError:
            return []
        records = []
        for line in lines:
            try:
                record = json.loads(line)
                if "loss" in record and type(record["step"]) is int and _time(record) > 0:
                    records.append(record)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # the first line may have lost its beginning, the last one its end
        return records


def _time(record: dict[str, Any]) -> float:
    time = record.get("time")  # absent in records of an earlier FGPT
    return time if isinstance(time, float) else 0.0
