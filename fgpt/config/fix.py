"""`fgpt check --fix`: the DeepSpeed JSON that runs, and what became of the user's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fgpt.config.batch import ACCUMULATION, GLOBAL, MICRO
from fgpt.config.resolve import Examined, Resolved, RunRequest, apply_edits, examine
from fgpt.errors import ConfigError, ConfigIssue
from fgpt.utils.keys import AUTO

_MOST_ROUNDS = 20
"""More than any file needs: a remedy can reveal a few further errors at most."""
HEADINGS = (
    "dropped as a capability",
    "changed",
    "renamed or translated",
    "filled in",
    "kept, with a warning",
    "dropped without effect",
)
"""What becomes of keys, the gravest first."""


@dataclass(frozen=True)
class Fixed:
    """The result of `fix`."""

    deepspeed: dict[str, Any]
    """A complete DeepSpeed JSON, which resolves without errors."""
    resolved: Resolved
    """Its configuration."""
    issues: dict[str, list[ConfigIssue]]
    """One of HEADINGS -> the issues of the user's JSON that ended so."""


def fix(request: RunRequest, *, world: int, device: str) -> Fixed:
    """Follow the remedy of every issue of the DeepSpeed JSON until none is an error.

    Raises ConfigError for errors that the JSON cannot mend: of the run file, the flags, or the
    number of processes.
    """
    issues: dict[str, ConfigIssue] = {}
    for _ in range(_MOST_ROUNDS):
        examined = examine(request, world=world, device=device)
        errors = [issue for issue in examined.issues if issue.grade == "error"]
        issues |= {str(issue): issue for issue in examined.issues}
        if examined.resolved is not None:
            return _fixed(examined, examined.resolved, list(issues.values()))
        tree = copy.deepcopy(examined.tree)
        apply_edits(tree, errors)
        if tree == examined.tree and tree == request.deepspeed:
            break
        request = replace(request, deepspeed=tree, deepspeed_flags=())
    raise ConfigError(examined.issues)


def _fixed(examined: Examined, resolved: Resolved, issues: Sequence[ConfigIssue]) -> Fixed:
    deepspeed = copy.deepcopy(resolved.deepspeed)
    for name in (GLOBAL, MICRO, ACCUMULATION):
        if examined.tree.get(name) in (None, AUTO):
            del deepspeed[name]  # DeepSpeed derives it, for any number of processes
    sorted_issues: dict[str, list[ConfigIssue]] = {}
    for issue in issues:
        sorted_issues.setdefault(_heading(issue), []).append(issue)
    return Fixed(deepspeed, resolved, sorted_issues)


def _heading(issue: ConfigIssue) -> str:
    """Which of HEADINGS an issue belongs to."""
    sets_value = any(edit.value is not None for edit in issue.edits)
    if issue.grade == "error":
        return "changed" if sets_value else "dropped as a capability"
    if not issue.edits:
        return "filled in" if issue.grade == "note" else "kept, with a warning"
    return "renamed or translated" if sets_value else "dropped without effect"
