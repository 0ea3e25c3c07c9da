"""`fgpt check --fix`: the DeepSpeed JSON that runs, and what became of the user's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fgpt.config.batch import ACCUMULATION, GLOBAL, MICRO
from fgpt.config.deepspeed.formats import read_deepspeed
from fgpt.config.deepspeed.settings import leaf_values, value_at
from fgpt.config.resolve import Examined, Resolved, RunRequest, apply_edits, examine
from fgpt.config.run_file import Override
from fgpt.errors import ConfigError, ConfigIssue
from fgpt.utils.keys import AUTO

_MOST_ROUNDS = 20
"""More than any file needs: a remedy can reveal a few further errors at most."""
HEADINGS = (
    "dropped as a capability",
    "dropped as unknown or invalid",
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
    values: list[tuple[str, Any, Any]]
    """Every key that differs from the user's JSON: dotted, value then, value now; None: absent."""


def fix(request: RunRequest, *, world: int, device: str) -> Fixed:
    """Follow the remedy of every issue of the DeepSpeed JSON until none is an error.

    Raises ConfigError for errors that the JSON cannot mend: of the run file, the flags, or the
    number of processes.
    """
    issues: dict[str, ConfigIssue] = {}
    before: Mapping[str, Any] | None = request.deepspeed
    if before is None:
        before = read_deepspeed(request.ds_config)
    for _ in range(_MOST_ROUNDS):
        examined = examine(request, world=world, device=device)
        errors = [issue for issue in examined.issues if issue.grade == "error"]
        issues |= {str(issue): issue for issue in examined.issues}
        if examined.resolved is not None:
            return _fixed(before, examined, examined.resolved, list(issues.values()))
        tree = copy.deepcopy(examined.tree)
        apply_edits(tree, errors)
        if tree == examined.tree and tree == request.deepspeed:
            break
        # the new JSON no longer has what it wished of the run
        wishes = [e for i in examined.issues if i.grade != "error" for e in i.edits]
        granted = [e for e in wishes if e.path.startswith("run.")]
        overrides = [Override(e.path.removeprefix("run."), e.value, "--set") for e in granted]
        request = replace(
            request,
            deepspeed=tree,
            deepspeed_flags=(),
            overrides=(*request.overrides, *overrides),
        )
    raise ConfigError(examined.issues)


def _fixed(
    before: Mapping[str, Any], examined: Examined, resolved: Resolved, issues: Sequence[ConfigIssue]
) -> Fixed:
    deepspeed = copy.deepcopy(resolved.deepspeed)
    for name in (GLOBAL, MICRO, ACCUMULATION):
        if examined.tree.get(name) in (None, AUTO):
            del deepspeed[name]  # DeepSpeed derives it, for any number of processes
    sorted_issues: dict[str, list[ConfigIssue]] = {}
    for issue in issues:
        sorted_issues.setdefault(_heading(issue), []).append(issue)
    old, new = dict(leaf_values(before)), dict(leaf_values(deepspeed))
    values = [
        # a section without keys counts as a value, and may have had keys before
        (path, old.get(path, value_at(before, path)), new.get(path))
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]
    return Fixed(deepspeed, resolved, sorted_issues, values)


def _heading(issue: ConfigIssue) -> str:
    """Which of HEADINGS an issue belongs to."""
    sets_value = any(edit.value is not None for edit in issue.edits)
    if issue.grade == "error":
        if sets_value:
            return "changed"
        return "dropped as a capability" if issue.rule else "dropped as unknown or invalid"
    if not issue.edits:
        return "filled in" if issue.grade == "note" else "kept, with a warning"
    return "renamed or translated" if sets_value else "dropped without effect"
