"""The errors a user can meet.

    FgptError                 anything FGPT reports in one line; never a traceback
    +-- UserError             the input is wrong: exit code 2
    |   +-- ConfigError       the DeepSpeed JSON, the run file or a flag (carries ALL issues found)
    |   +-- DataError         a corpus, a tokenizer, a shard or a data card
    |   +-- CheckpointError   nothing to resume from, or what is there does not fit or is damaged
    |   +-- LaunchError       the launcher and the processes disagree
    +-- TrainingError         the run itself cannot go on (non-finite steps, disk full): exit code 1
        +-- LostRankError     another process of the run is gone; each that notices says so

`fgpt.cli` and `launchers/train.py` turn these into one line on stderr and the exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class FgptError(Exception):
    """Base of everything reported without a traceback. `exit_code` is the process's."""

    exit_code = 1


class UserError(FgptError):
    """The input is wrong; the message says what, where, the value and the remedy."""

    exit_code = 2


@dataclass(frozen=True)
class ConfigIssue:
    """One thing wrong with a configuration."""

    where: str
    """The place: `ds_configs/zero2.json: zero_optimization.stage`, `--set model.n_head`, ..."""
    what: str
    """What is wrong there, with the offending value."""
    fix: str
    """What to write instead."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what} -> {self.fix}"


class ConfigError(UserError):
    """Every issue of a configuration, in one report."""

    def __init__(self, issues: Sequence[ConfigIssue]):
        self.issues = tuple(issues)
        noun = "error" if len(self.issues) == 1 else "errors"
        lines = [f"configuration: {len(self.issues)} {noun}"]
        lines += [f"  {i}. {issue}" for i, issue in enumerate(self.issues, 1)]
        super().__init__("\n".join(lines))


class DataError(UserError):
    """A corpus, tokenizer, shard or data card cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit this run."""


class LaunchError(UserError):
    """The number of processes, their ranks or their devices are not what was announced."""


class TrainingError(FgptError):
    """The run cannot go on."""


class LostRankError(TrainingError):
    """Another rank ended; its own message, if it could give one, says why."""
