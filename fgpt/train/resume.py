"""The checkpoint that a run resumes from: choosing it, what may differ, what is said of it."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.checkpoint.directory import NAME, locate
from fgpt.checkpoint.identity import (
    SKIPPED,
    begins_anew,
    change_of_later_samples,
    changed_settings,
    check_identity,
    check_shapes,
    identity_until,
    kept_states,
    run_layout,
)
from fgpt.checkpoint.manager import Checkpoints, ResumePoint
from fgpt.checkpoint.manifest import Manifest, Start
from fgpt.distributed.agreements import run_on_all, run_on_rank0
from fgpt.engine.state import EMA
from fgpt.errors import CheckpointError
from fgpt.parallel.tensor.sharding import full_shapes
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.load import COPY, save_copy
from fgpt.train.relaunch import FILE as LAUNCH
from fgpt.train.relaunch import describe_launch, restarted_by
from fgpt.train.run_dir import RunDir, check_shared, without_links
from fgpt.train.startup import RunContext

if TYPE_CHECKING:
    from fgpt.train.init_from import InitialWeights


@dataclass(frozen=True)
class ResumePlan:
    """Where a run starts."""

    resume_point: ResumePoint | None
    """The checkpoint to load, or None for initial weights."""
    checkpoints: Checkpoints
    """The run directory's checkpoints."""
    run_dir: RunDir | None
    """The locked run directory on rank 0, None on the other ranks."""
    states: tuple[str, ...] = ()
    """The optimizer states to load."""
    origin: tuple[int, int] = (0, 0)
    """The step that the run starts at, and the number of its first sample."""
    tokens_before: int = 0
    """Tokens seen before this start."""
    history: tuple[Start, ...] = ()
    """The starts of the run, this one included."""
    launch: dict[str, Any] = field(default_factory=dict)
    """The launch of this start (see `fgpt.train.relaunch`)."""
    weights: InitialWeights | None = None
    """The weights that a new run starts from; None: initial values."""

    @property
    def is_evaluated(self) -> bool:
        """Whether the resume point was evaluated before it was saved."""
        return self.resume_point is not None and self.resume_point.manifest.valid_loss is not None

    @property
    def is_saved_here(self) -> bool:
        """Whether the resume point is one of the run directory's own checkpoints."""
        point, own = self.resume_point, self.checkpoints.directory.root
        return point is not None and point.path.parent == own


def plan_resume(
    context: RunContext, resume: str, identity: dict[str, Any], allow: Collection[str] = ()
) -> ResumePlan:
    """Lock the run directory and choose the checkpoint; changes nothing on disk but the lock.

    `resume`, `allow`: see `fgpt.train.run.run`. Raises CheckpointError, LaunchError.
    """
    world, device = context.world, context.device
    run_dir = run_on_all(lambda: RunDir(context.path) if world.is_rank0 else None, device)
    if world.local_size < world.size:
        check_shared(context)
    options = context.resolved.run.checkpoint
    warn = partial(context.print, style="bold red")
    checkpoints = Checkpoints(context.path / "checkpoints", world, device, options, warn)
    launch = describe_launch(os.environ, device)
    point = _choose_after_restart(context, checkpoints, resume, launch)
    if point is None:
        point = _choose_checkpoint(context, checkpoints, resume)
    layout = run_layout(context.resolved)
    if point is None:
        weights = None
        if context.resolved.run.train.init_from is not None:
            from fgpt.train.init_from import open_initial_weights  # rarely needed

            weights = open_initial_weights(context)
        start = Start(0, 0, layout)
        if weights is not None:
            base_model = weights.source.facts.base_model
            start = replace(start, origin=weights.describe(), base_model=base_model)
        return ResumePlan(
            None, checkpoints, run_dir, history=(start,), launch=launch, weights=weights
        )
    # what is different, and whether that is allowed
    manifest, where = point.manifest, str(point.path)
    if "deepspeed" not in manifest.config:
        raise CheckpointError(
            f"{where}: has imported weights and no run to go on with: start one with --init_from"
            f" {resume if resume != 'auto' else where} instead of --resume"
        )
    check_shapes(manifest, full_shapes(context.resolved.run.model), identity, where)
    saved, current = (
        identity_until(each, manifest.samples_seen) for each in (manifest.identity, identity)
    )
    changes = check_identity(saved, current, where, allow)
    later = change_of_later_samples(manifest.identity, identity)
    if later is not None and not any(each.startswith(f"{SKIPPED}: ") for each in changes):
        changes = (*changes, later)
    sample = 0 if begins_anew(changes) else manifest.samples_seen
    start = Start(manifest.step, manifest.tokens_seen, layout, changes)
    return ResumePlan(
        point,
        checkpoints,
        run_dir,
        (
            *kept_states(manifest.optimizer, manifest.states, context.resolved),
            *([EMA] if _keeps_average(context, manifest) else []),
        ),
        (manifest.step, sample),
        manifest.tokens_seen,
        (*manifest.history, start),
        launch,
    )


def _choose_after_restart(
    context: RunContext, checkpoints: Checkpoints, resume: str, launch: dict[str, Any]
) -> ResumePoint | None:
    """The newest checkpoint of what this launch began, if a launcher restarts it: `resume` is of
    the first start. None: no restart, or no checkpoint yet.
    """
    launcher = run_on_rank0(lambda: restarted_by(launch, context.path), context.device)
    if launcher is None or resume == "auto" or (point := checkpoints.find()) is None:
        return None
    context.print(f"restarted by {launcher}: --resume {resume} was for the first start, now auto")
    return point


def _choose_checkpoint(
    context: RunContext, checkpoints: Checkpoints, resume: str
) -> ResumePoint | None:
    # 1. no path: nothing, or the newest usable checkpoint of this run
    if resume == "none":
        return None
    if resume == "auto":
        point = checkpoints.find()
        if point is None:
            context.print(f"no checkpoint in {checkpoints.directory.root}: starting at step 0")
        return point
    # 2. a path: one checkpoint, or the newest usable one of a run directory
    root, only = map(_path, run_on_rank0(lambda: _locate(resume), context.device))
    assert root is not None
    # 3. this run's own directory under another spelling is this run
    if root == without_links(checkpoints.directory.root):
        root = checkpoints.directory.root
        only = root / only.name if only else None
    source = Checkpoints(root, context.world, context.device, checkpoints.options)
    point = source.find(only)
    if point is None:
        raise CheckpointError(
            f"--resume {resume}: no checkpoint there; name a run directory or one of its"
            " checkpoints/step_NNNNNNNN, or use --resume auto"
        )
    steps = context.resolved.run.train.steps
    if root != checkpoints.directory.root and point.manifest.step > steps:
        raise CheckpointError(
            f"{point.path} is of step {point.manifest.step}, the last one is {steps}: raise --steps"
        )
    return point


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _locate(resume: str) -> list[str | None]:
    """The directory and, if it names one, the checkpoint of --resume PATH. Raises CheckpointError,
    listing the checkpoints nearby, if there is nothing to load.
    """
    path = without_links(Path(resume))
    directory, only = locate(path)
    _check_resume_path(resume, only or path)
    return [str(directory.root), str(only) if only else None]


def _check_resume_path(written: str, path: Path) -> None:
    """Raise CheckpointError, listing the checkpoints nearby, unless there is something to load."""
    steps = [found for found in (path, *path.glob("step_*")) if NAME.fullmatch(found.name)]
    steps += path.glob("checkpoints/step_*")
    if path.is_dir() and steps:
        return
    # the nearest directory with checkpoints: of the run that was probably meant
    around = (path.parent, path.parent / "checkpoints", path.parent.parent)
    problem = "is a file" if path.is_file() else "has no checkpoint"
    if not path.exists():
        problem = "does not exist"
    fix = "name a run directory or one of its checkpoints/step_NNNNNNNN, or use --resume auto"
    for folder in around if written else ():
        if names := sorted(p.name for p in folder.glob("step_*") if NAME.fullmatch(p.name)):
            fix = f"{folder} has {', '.join(names)}"
            break
    raise CheckpointError(f"--resume {written or repr(written)}: {problem}; {fix}")


def claim_run_dir(context: RunContext, plan: ResumePlan, tokenizer: Tokenizer) -> None:
    """Make the run directory this run's: continue the run in it, or move that one away. It gets a
    copy of the tokenizer, so that the run can be used without its data.

    Called right before training, so that a run that fails to start changes nothing.
    """
    point, checkpoints, run_dir = plan.resume_point, plan.checkpoints, plan.run_dir

    def claim() -> str | None:
        """Returns what became of an earlier run."""
        assert run_dir is not None  # on rank 0
        if point is not None and plan.is_saved_here:
            run_dir.truncate_records(point.manifest.step)
            renamed = checkpoints.directory.rename_newer(point.manifest.step)
            text = f"later checkpoints are now {', '.join(renamed)}" if renamed else None
        else:
            moved = run_dir.move_earlier_run()
            text = None if moved is None else f"earlier run moved to {moved}"
        checkpoints.directory.prepare()
        run_dir.write_json("config.json", context.resolved.to_json())
        run_dir.write_json(LAUNCH, plan.launch)
        save_copy(tokenizer, run_dir.path / COPY)
        return text

    for reason in () if point is None else point.rejected:
        context.print(f"unusable checkpoint skipped: {reason}", "bold red")
    if (text := run_on_rank0(claim, context.device)) is not None:
        context.print(text)
    if point is not None:
        _print_resume(context, plan, point)


def _print_resume(context: RunContext, plan: ResumePlan, point: ResumePoint) -> None:
    """Print where the run goes on, and everything that differs from the checkpoint."""
    manifest = point.manifest
    context.print(f"resuming from {point.path} at step {manifest.step}")
    if (init_from := context.resolved.run.train.init_from) is not None:
        context.print(f"  the weights of {init_from} are not read again")
    # 1. number of ranks, and configuration
    before, now = (start[-1].layout.get("ranks") for start in (manifest.history, plan.history))
    changes = [f"ranks: {before} -> {now}"] if before != now else []
    allowed = plan.history[-1].changes
    saved, current = manifest.config, context.resolved.to_json()
    for section in ("run", "deepspeed"):
        found = changed_settings(saved.get(section, {}), current[section], f"{section}.")
        is_said = ("run.run_dir: ", *(f"run.{change}" for change in allowed))
        changes += [change for change in found if not change.startswith(is_said)]
    for change in changes:
        context.print(f"  changed since the checkpoint: {change}")
    # 2. what --allow let differ
    for change in allowed:
        context.print(f"  allowed to differ: {change}")
    if allowed:
        context.print(f"  the data goes on at sample {plan.origin[1]:,}")
    # 3. optimizer states that begin afresh
    optimizer = context.resolved.deepspeed["optimizer"]["type"]
    if manifest.step > 0 and not {*plan.states} - {EMA} and _state_names(context):
        has = f"those of {manifest.optimizer}" if manifest.states else "none"
        text = f"  the states of {optimizer} begin afresh: the checkpoint has {has}"
        context.print(text, "bold red")
    elif manifest.states and (new := set(_state_names(context)) - set(manifest.states)):
        context.print(f"  begins afresh: {', '.join(sorted(new))} of {optimizer}", "bold red")
    if context.resolved.run.train.ema is not None and not manifest.has_average:
        context.print("  the moving average begins with these weights: the checkpoint has none")
    # 4. the schedule
    from fgpt.train.schedule_change import schedule_change  # only needed here

    if text := schedule_change(context.resolved, manifest):
        context.print(f"  {text}")


def _keeps_average(context: RunContext, manifest: Manifest) -> bool:
    """Whether this run goes on with the checkpoint's moving average."""
    return context.resolved.run.train.ema is not None and manifest.has_average


def _state_names(context: RunContext) -> Sequence[str]:
    """The optimizer states of this run."""
    settings = context.resolved.settings
    assert settings.optimizer is not None  # resolved
    return settings.optimizer.state_names(settings.optimizer_params)
