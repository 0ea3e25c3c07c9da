"""The errors that FGPT reports to the user in one line, without a traceback.

    FgptError
    +-- UserError             wrong input: exit code 2
    |   +-- ConfigError       the DeepSpeed JSON, the run file or a flag (with ALL issues)
    |   +-- DataError         a corpus, a tokenizer, a shard or a data card
    |   +-- CheckpointError   a checkpoint is missing, damaged, or of another run
    |   +-- LaunchError       the launcher and the processes disagree
    +-- TrainingError         the run cannot continue (non-finite steps, full disk): exit code 1
        +-- LostRankError     another process of the run has ended

`fgpt.cli.main` and `fgpt.cli.train.main` print them to stderr and exit with the error's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class FgptError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = 1
    """Of the process."""


class UserError(FgptError):
    """Wrong input; the message has the place, the value and the remedy."""

    exit_code = 2


@dataclass(frozen=True)
class ConfigIssue:
    """One finding of the configuration check."""

    where: str
    """`ds_configs/zero2.json: zero_optimization.stage`, `--set model.n_head`, ..."""
    what: str
    """The finding, with the offending value."""
    fix: str
    """The remedy."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what} -> {self.fix}"


class ConfigError(UserError):
    """All issues of a configuration in one report."""

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
    """The launcher's environment contradicts the processes or their devices."""


class TrainingError(FgptError):
    """The run cannot continue."""


class LostRankError(TrainingError):
    """Another rank has ended; that rank's message, if any, has the reason."""
