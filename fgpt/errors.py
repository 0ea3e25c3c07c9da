"""The errors that FGPT reports to the user in one line, without a traceback.

    FgptError
    +-- UserError             wrong input: exit code 2
    |   +-- ConfigError       the DeepSpeed JSON, the run file or a flag (with ALL issues)
    |   +-- DataError         a corpus, a tokenizer, a shard or a data card
    |   +-- CheckpointError   a checkpoint is missing, damaged, or of another run
    |   +-- LaunchError       the launcher and the processes disagree
    +-- TrainingError         the run cannot continue (non-finite steps, full disk): exit code 1
        +-- BadBatchError     a step must not be kept: not finite, or a jump of the loss
        +-- LostRankError     another process of the run has ended

`fgpt.cli.main` and `fgpt.cli.train.main` print them to stderr and exit with the error's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


def printable(text: str) -> str:
    """Escape control characters, which a terminal would obey, and undecodable bytes of names."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class FgptError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = 1
    """Of the process."""
    agreed = False
    """Whether every rank of the run raised this error, so that they can clean up together."""

    def __str__(self) -> str:
        # messages quote names and values from files and the command line
        return "\n".join(map(printable, super().__str__().split("\n")))


class UserError(FgptError):
    """Wrong input; the message has the place, the value and the remedy."""

    exit_code = 2


Grade = Literal["error", "warning", "note"]
"""error: the run does not start. warning: harmless, dropped or translated, and said. note: what
"auto" and absent values became."""


class Edit(NamedTuple):
    """One change of the configuration: what a remedy means when it is followed."""

    path: str
    """`deepspeed.<key>` or `run.<field>`."""
    value: Any = None
    """The new value; None removes the key."""


@dataclass(frozen=True)
class ConfigIssue:
    """One finding of the configuration check."""

    where: str
    """`ds_configs/zero2.json: zero_optimization.stage`, `--set model.n_head`, ..."""
    what: str
    """The finding, with the offending value."""
    fix: str
    """The remedy of an error; what became of the value otherwise."""
    grade: Grade = "error"
    """What the finding means for the run."""
    edits: tuple[Edit, ...] = ()
    """The remedy as changes; those of warnings have been applied."""
    rule: str = ""
    """The id of the rule that found it; empty: the check of names, types and ranges."""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what} -> {self.fix}"
        return printable(text + (f" [{self.rule}]" if self.rule else ""))


class ConfigError(UserError):
    """All issues of a configuration in one report."""

    def __init__(self, issues: Sequence[ConfigIssue]):
        self.issues = tuple(issue for issue in issues if issue.grade == "error")
        """The errors."""
        self.warnings = tuple(issue for issue in issues if issue.grade == "warning")
        """Values that were dropped or translated; they did not stop the run."""
        lines = ["configuration: " + _counted(len(self.issues), "error")]
        lines += [f"  {i}. {issue}" for i, issue in enumerate(self.issues, 1)]
        if self.warnings:
            lines += [f"and {_counted(len(self.warnings), 'warning')}, beside which it would run:"]
            lines += [f"  - {issue}" for issue in self.warnings]
        super().__init__("\n".join(lines))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


class DataError(UserError):
    """A corpus, tokenizer, shard or data card cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit this run."""


class LaunchError(UserError):
    """The launcher's environment contradicts the processes or their devices."""


class TrainingError(FgptError):
    """The run cannot continue."""


class BadBatchError(TrainingError):
    """The step on a batch must not be kept."""

    agreed = True  # all ranks judge the same step

    def __init__(self, message: str, step: int, samples: Sequence[int]):
        super().__init__(message)
        self.step = step
        """Steps finished before it."""
        self.samples = tuple(samples)
        """Global sample numbers of the batch."""


class LostRankError(TrainingError):
    """Another rank has ended; that rank's message, if any, has the reason."""
