"""The runs of `fgpt resume-check`, and its table: does a resumed run go on as the whole one?"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fgpt.errors import TrainingError, UserError
from fgpt.parity.resume_layouts import INTERRUPTED, UNINTERRUPTED, ResumeCheck, Target
from fgpt.parity.resume_rank import error_file, is_complete
from fgpt.parity.resume_verdict import (
    EIGHT_BIT,
    KINDS,
    ResumeVerdict,
    bounds_between_layouts,
    compare,
)


def check_resume(
    check: ResumeCheck,
    folder: Path,
    start: Callable[[Sequence[str], int], int],
    say: Callable[[str], None],
    *,
    keep: bool,
) -> list[ResumeVerdict]:
    """Train all runs and compare them; returns a verdict for each layout.

    `start(names, n)` trains these runs on n ranks and returns the exit code. `keep`: the run
    directories stay, else those of a layout are removed once it is compared. Raises TrainingError
    or UserError if the run fails that is to be interrupted.
    """
    # 1. the user's run, whole and interrupted
    world, ranks = check.same.resolved.batch.world, check.same.grid
    say(f"training {check.steps} steps, and {check.at} of them ({ranks})")
    if code := start([UNINTERRUPTED, INTERRUPTED], world):
        is_second = is_complete(folder / UNINTERRUPTED)
        name = INTERRUPTED if is_second else UNINTERRUPTED
        kind = UserError if code == UserError.exit_code else TrainingError
        raise kind(f"the {name} run: {_reason(folder / name, code)}")
    # 2. each layout, in other processes
    failures: dict[str, str] = {}
    verdicts = {}
    for n in dict.fromkeys(target.resolved.batch.world for target in check.targets):
        waiting = [t for t in check.targets if t.resolved.batch.world == n]
        while waiting:
            say(f"resuming at {', '.join(t.name for t in waiting)} ({n} rank{'s' * (n > 1)})")
            code = start([t.name for t in waiting], n)
            done = _n_complete(waiting, folder) if code else len(waiting)
            if code:
                failures[waiting[done].name] = _reason(folder / waiting[done].name, code)
            for target in waiting[: done + 1]:
                failure = failures.get(target.name)
                verdicts[target.name] = compare(check, target, folder, failure)
                if not keep:
                    shutil.rmtree(folder / target.name, ignore_errors=True)
            waiting = waiting[done + 1 :]
    return [verdicts[target.name] for target in check.targets]


def _n_complete(targets: Sequence[Target], folder: Path) -> int:
    """How many of these runs, from the first on, are complete; one has failed."""
    incomplete = (i for i, t in enumerate(targets) if not is_complete(folder / t.name))
    return next(incomplete, len(targets) - 1)


def _reason(run_dir: Path, code: int) -> str:
    try:
        return error_file(run_dir).read_text()
    except FileNotFoundError:
        return f"its ranks ended with exit code {code}"


def render(check: ResumeCheck, verdicts: Sequence[ResumeVerdict], console: Console) -> None:
    """Print the bounds, the table, what was not run and every departure."""
    bounds = bounds_between_layouts(check.same.resolved)
    tensors = "all parameters'" if bounds == EIGHT_BIT else "each parameter's"
    table = Table(title="largest relative difference from the uninterrupted run")
    table.title_justify = "left"
    for heading in ("layout", "", *KINDS.values(), ""):
        table.add_column(heading, overflow="fold")
    for verdict in verdicts:
        cells = (_cell(verdict, kind) for kind in KINDS)
        state = "DIFFERS" if verdict.departures else "same run"
        table.add_row(verdict.layout, verdict.grid, *cells, state)
    console.print(table)
    _print(
        console,
        "bounds: same: equal in every bit; other layouts: losses"
        f" {bounds.loss:.0e}, norms {bounds.norm:.0e}, {tensors} weights and states"
        f" {bounds.tensors:.0e}; rates, samples, counters and the state as loaded: equal",
    )
    for name, reason in check.refused.items():
        _print(console, f"not run: {name}: {reason}")
    differing = [verdict for verdict in verdicts if verdict.departures]
    for verdict in differing:
        for kind, text in verdict.departures.items():
            _print(console, f"{verdict.layout}: {KINDS.get(kind, kind)}: {text}")
    n, layouts = len(verdicts), f"layout{'s' * (len(verdicts) > 1)}"
    if differing:
        _print(console, f"{len(differing)} of {n} {layouts} do not resume the same run")
    else:
        _print(console, f"{n} {layouts}: the same run")


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _cell(verdict: ResumeVerdict, kind: str) -> str:
    difference = verdict.differences.get(kind)
    if difference:
        return f"{difference:.1e}"
    if kind in verdict.departures:
        return "DIFFER"
    return "" if difference is None else "equal"


def as_json(check: ResumeCheck, verdicts: Sequence[ResumeVerdict]) -> dict[str, Any]:
    """Return the result as JSON values."""
    return {
        "steps": check.steps,
        "at": check.at,
        "same": not any(verdict.departures for verdict in verdicts),
        "layouts": [asdict(verdict) | {"bounds": verdict.bounds._asdict()} for verdict in verdicts],
        "not_run": check.refused,
    }
