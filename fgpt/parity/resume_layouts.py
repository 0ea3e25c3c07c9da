"""What `fgpt resume-check` trains: the user's run, and that run at the layouts it is resumed at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fgpt.config.deepspeed.settings import MONITORS
from fgpt.config.resolve import DS_SET, Resolved, RunRequest
from fgpt.config.run_file import Override
from fgpt.errors import ConfigError, UserError
from fgpt.parity.layouts import ComparedRun, Layout, parse_layout, user_run

SAME, HALF, DOUBLE, PLAIN = "same", "half", "double", "plain"
ALL = ("zero0", "zero1", "zero2", "zero3", "tp2", "pp2", "cp2", HALF, DOUBLE, PLAIN)
"""Names of `--layouts all`."""
UNINTERRUPTED, INTERRUPTED = "uninterrupted", "interrupted"
"""Directories of the two runs at the user's own layout."""
MAX_RANKS = 4
"""Ranks that a derived layout may have on a CPU."""
_FIELDS: dict[str, Any] = {
    "eval.every": 0,
    "eval.batches": 1,
    "sample.tokens": 0,
    "checkpoint.every": 0,
    "checkpoint.keep_every": 0,
    "checkpoint.best": False,
}
"""Fields of the run file that only cost time here."""
_OUTPUT = (
    *MONITORS,
    "flops_profiler",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "steps_per_print",
)
"""Keys of the JSON that write or print elsewhere, and change no number."""


@dataclass(frozen=True)
class Target:
    """One layout that the run is resumed at."""

    name: str
    resolved: Resolved
    """The user's run in this layout."""

    @property
    def grid(self) -> str:
        """Ranks, parallel sizes and ZeRO stage in words."""
        batch = self.resolved.batch
        if self.resolved.run.train.engine == "plain":
            return "1 rank, no DeepSpeed"
        sizes = {"tp": batch.tp, "pp": batch.pp, "cp": batch.cp}
        axes = "".join(f" {axis} {size}" for axis, size in sizes.items() if size > 1)
        ranks = f"{batch.world} rank{'s' * (batch.world > 1)}"
        return f"{ranks}{axes} ZeRO-{self.resolved.zero_stage}"


@dataclass(frozen=True)
class ResumeCheck:
    """Everything that is trained and compared."""

    steps: int
    """Steps of the uninterrupted run."""
    at: int
    """The step that it is interrupted after."""
    same: Target
    """The user's own layout."""
    others: tuple[Target, ...]
    """The other layouts."""
    refused: dict[str, str] = field(default_factory=dict)
    """Layout that the configuration cannot have -> why."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """All layouts that the run is resumed at."""
        return (self.same, *self.others)


def make_resume_check(
    request: RunRequest,
    *,
    world: int,
    device: str,
    max_ranks: int,
    steps: int,
    at: int,
    names: Sequence[str] | None = None,
) -> ResumeCheck:
    """Return the runs of a request on `world` ranks.

    `names`: layouts by name, all, or None for the usual few. Raises ConfigError, and UserError if
    the configuration does not allow a layout that the user named. One of the usual layouts, or of
    all, that it does not allow is in `refused`.
    """
    if steps < 2:
        raise UserError(f"--steps {steps}: must be at least 2: some before the stop, some after it")
    if not 1 <= at < steps:
        raise UserError(f"--at {at}: must be at least 1, and below --steps {steps}")
    fields = _FIELDS | ({"train.deterministic": True} if device == "cuda" else {})
    changes = tuple(Override(name, value, "fgpt resume-check") for name, value in fields.items())
    quiet = tuple(Override(key, None, DS_SET) for key in _OUTPUT)
    request = replace(
        request,
        overrides=(*request.overrides, *changes),
        deepspeed_flags=(*request.deepspeed_flags, *quiet),
    )
    user, compared_run = user_run(request, world, device, steps)
    named = names is not None and list(names) != ["all"]
    chosen = ALL if names is not None and not named else names or _usual(user)
    others: list[Target] = []
    refused = {}
    for name in dict.fromkeys(chosen):
        if name == SAME:
            continue
        try:
            target = _target(name, user, compared_run, max_ranks)
        except UserError as error:
            reason = _in_one_line(error)
            if named:
                raise UserError(f"--layouts {name}: {reason}") from error
            refused[name] = reason
            continue
        twin = next((t.name for t in others if _place(t.resolved) == _place(target.resolved)), None)
        if _place(target.resolved) == _place(user):
            refused[name] = "the configuration's own layout"
        elif twin is not None:
            refused[name] = f"the layout {twin}"
        else:
            others.append(target)
    return ResumeCheck(steps, at, Target(SAME, user), tuple(others), refused)


def _in_one_line(error: UserError) -> str:
    if not isinstance(error, ConfigError):
        return str(error)
    # the key alone: the file is the user's, and the flag is this verb's own
    places = [issue.where.rpartition(": ")[2] for issue in error.issues]
    keys = ["" if place.startswith("--layouts") else f"{place}: " for place in places]
    return "; ".join(
        f"{key}{issue.what} -> {issue.fix}" for key, issue in zip(keys, error.issues, strict=True)
    )


def _usual(user: Resolved) -> tuple[str, ...]:
    """The layouts without --layouts: another number of ranks, another ZeRO stage, tp and pp."""
    ranks = HALF if user.batch.world > 1 else DOUBLE
    return (ranks, "zero1" if user.zero_stage == 3 else "zero3", "tp2", "pp2")


def _place(resolved: Resolved) -> tuple[Any, ...]:
    """What tells one layout from another."""
    batch, run = resolved.batch, resolved.run
    grid = (batch.world, batch.tp, batch.pp, batch.cp, run.parallel.sequence)
    if run.train.engine == "plain":
        return (PLAIN,)
    return (*grid, resolved.zero_stage, resolved.settings.checkpointing is None)


def _target(name: str, user: Resolved, compared_run: ComparedRun, max_ranks: int) -> Target:
    """Return the run in the layout of this name. Raises ConfigError, UserError."""
    if name == PLAIN:
        return Target(name, _fitted(compared_run, 1, Layout()).oracle())
    world = user.batch.world
    layout = _users_layout(user)
    if name == HALF:
        if world % 2:
            raise UserError(f"{world} rank{'s' * (world > 1)} cannot be halved")
        world //= 2
    elif name == DOUBLE:
        world *= 2
    else:
        layout = _parsed(name, user)
        size = layout.tp * layout.pp * layout.cp
        world = world if world % size == 0 else size
        name = layout.name
    if world > max_ranks:
        raise UserError(f"needs {world} ranks, at most {max_ranks} are started here")
    return Target(name, _fitted(compared_run, world, layout).resolved(layout))


def _users_layout(user: Resolved) -> Layout:
    batch = user.batch
    return Layout(batch.tp, batch.pp, batch.cp, user.run.parallel.sequence)


def _parsed(name: str, user: Resolved) -> Layout:
    """The layout of a name; zero3 is the user's grid with that stage, pp2 has ZeRO-1 at most."""
    layout = parse_layout(name)
    own = _users_layout(user)
    if layout == Layout(stage=layout.stage, recompute=layout.recompute) and name != "dp":
        return replace(own, stage=layout.stage, recompute=layout.recompute)
    if layout.pp > 1 and layout.stage is None and user.zero_stage > 1:
        return replace(layout, stage=1)
    return layout


def _fitted(compared_run: ComparedRun, world: int, layout: Layout) -> ComparedRun:
    """The run on so many ranks, with the largest micro-batch that they divide the batch into."""
    dp = max(1, world // (layout.tp * layout.pp * layout.cp))
    micro, rest = compared_run.micro, compared_run.global_batch % dp
    # a global batch that the ranks do not divide is refused by a rule, with its numbers
    micro = micro if rest else math.gcd(micro, compared_run.global_batch // dp)
    return replace(compared_run, world=world, micro=micro)


@dataclass(frozen=True)
class PlannedRun:
    """One call of the trainer."""

    name: str
    """Name of its directory: a layout, or one of the two runs before."""
    resolved: Resolved
    """Its configuration, run directory included."""
    resume: str = "none"
    """See `fgpt.train.run.run`."""


def planned_runs(check: ResumeCheck, folder: Path) -> dict[str, PlannedRun]:
    """Return every run by name, in the order in which they train."""
    user = check.same.resolved
    source = str(checkpoint(folder / INTERRUPTED, check.at))
    runs = [
        _planned(user, folder / UNINTERRUPTED, check.steps),
        _planned(user, folder / INTERRUPTED, check.at, save_every=check.at),
    ]
    for target in check.targets:
        runs.append(_planned(target.resolved, folder / target.name, check.steps, resume=source))
    return {run.name: run for run in runs}


def _planned(
    resolved: Resolved, run_dir: Path, steps: int, save_every: int = 0, resume: str = "none"
) -> PlannedRun:
    """Only the number of steps is cut: the schedule stays that of the user's whole run.

    `save_every`: 0 saves at the end only; else the last save is one of the run's regular ones, in
    the background if checkpoint.async is on.
    """
    run = replace(
        resolved.run,
        run_dir=str(run_dir),
        train=replace(resolved.run.train, steps=steps),
        checkpoint=replace(resolved.run.checkpoint, every=save_every),
    )
    return PlannedRun(run_dir.name, replace(resolved, run=run), resume)


def checkpoint(run_dir: Path, step: int) -> Path:
    """Return the directory of a run's checkpoint."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def names_of(text: str) -> list[str]:
    """Return the names in --layouts. Raises UserError for one that is no layout."""
    names = text.split(",")
    if names == ["all"]:
        return names
    for name in names:
        try:
            if name not in (SAME, HALF, DOUBLE, PLAIN):
                parse_layout(name)
        except UserError as error:
            raise UserError(f"{error}; or same, half, double, plain") from error
    return names
