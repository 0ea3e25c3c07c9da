"""The run directory, and the checkpoint that a run resumes from.

The run directory belongs to one run at a time:

    config.json     the resolved configuration with the origin of each value
    metrics.jsonl   one line per step and per evaluation
    checkpoints/    see fgpt.checkpoint
    loss.png, sample.txt, summary.json   written at the end
    lock            held while a run writes here; contains rank 0's process id
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from fgpt.checkpoint.identity import (
    begins_anew,
    changed_settings,
    check_identity,
    check_shapes,
    kept_states,
    run_layout,
)
from fgpt.checkpoint.manager import BEST, LATEST, NAME, Checkpoints, ResumePoint
from fgpt.checkpoint.manifest import Manifest, Start
from fgpt.distributed.agreements import run_on_all, run_on_rank0
from fgpt.errors import CheckpointError, LaunchError
from fgpt.optim.schedules import learning_rate
from fgpt.parallel.tensor.sharding import full_shapes
from fgpt.train.startup import RunContext
from fgpt.utils.files import LockHeldError, acquire_lock, write_atomic

SHARED_FILE_S = 30.0
"""Time for a new file to appear on the other nodes, in seconds: network file systems cache."""
RUN_FILES = {"lock", "config.json", "metrics.jsonl", "checkpoints"}
"""A directory with any of these is a run directory."""


class RunDir:
    """The locked run directory; rank 0 only."""

    def __init__(self, path: Path):
        """Raises LaunchError if another run holds the lock, or the directory is not writable."""
        self.path = path
        try:
            self.lock = self._acquire()
        except OSError as error:
            raise LaunchError(
                f"--run_dir {path}: {error.strerror}; name a directory that can be made or written"
            ) from error

    def _acquire(self) -> FileIO:
        _without_links(self.path).mkdir(parents=True, exist_ok=True)  # also where a link leads
        present = {entry.name for entry in self.path.iterdir()}
        if present and not present & RUN_FILES:
            raise LaunchError(
                f"--run_dir {self.path}: contains {min(present)!r} and is no run directory; choose"
                " a new or empty directory, or that of an earlier run"
            )
        try:
            return acquire_lock(self.path / "lock", wait=False)  # until the process ends
        except LockHeldError as error:
            raise LaunchError(
                f"{self.path}: another run (process {error.pid}) writes here;"
                " stop it, or choose another --run_dir"
            ) from error

    def move_earlier_run(self) -> Path | None:
        """Rename an earlier run to NAME.1, NAME.2, ...; returns the new path, None without one.

        A mount point, or a directory in one that is not writable, cannot be renamed: then the
        earlier run moves into a directory of that name inside it.
        """
        if not any((self.path / name).exists() for name in ("metrics.jsonl", "checkpoints")):
            return None
        path = _without_links(self.path)  # a link to another disk stays, its target moves
        number = 1
        while any((parent / f"{path.name}.{number}").exists() for parent in (path.parent, path)):
            number += 1
        name = f"{path.name}.{number}"
        try:
            path.rename(path.with_name(name))
        except OSError:
            (path / name).mkdir()
            stays = re.compile(re.escape(path.name) + r"\.\d+|lock")
            for entry in path.iterdir():
                if not stays.fullmatch(entry.name):
                    entry.rename(path / name / entry.name)
            return path / name
        self.lock.close()
        self.lock = self._acquire()
        return path.with_name(name)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically."""
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
        write_atomic(self.path / name, text.encode())

    def truncate_metrics(self, step: int) -> None:
        """Drop records after `step`, which will be trained again, and an incomplete last line."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                break
            if record["step"] <= step:
                kept.append(line)
        write_atomic(path, "".join(line + "\n" for line in kept).encode())


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


def plan_resume(
    context: RunContext, resume: str, identity: dict[str, Any], allow: Collection[str] = ()
) -> ResumePlan:
    """Lock the run directory and choose the checkpoint; changes nothing on disk but the lock.

    `resume`, `allow`: see `fgpt.train.run.run`. Raises CheckpointError, LaunchError.
    """
    world, device = context.world, context.device
    run_dir = run_on_all(lambda: RunDir(context.path) if world.is_rank0 else None, device)
    if world.local_size < world.size:
        _check_shared(context)
    options = context.resolved.run.checkpoint
    warn = partial(context.print, style="bold red")
    checkpoints = Checkpoints(context.path / "checkpoints", world, device, options, warn)
    point = _choose_checkpoint(context, checkpoints, resume)
    layout = run_layout(context.resolved)
    if point is None:
        return ResumePlan(None, checkpoints, run_dir, history=(Start(0, 0, layout),))
    # what is different, and whether that is allowed
    manifest, where = point.manifest, str(point.path)
    changes = check_identity(manifest.identity, identity, where, allow)
    check_shapes(manifest, full_shapes(context.resolved.run.model), where)
    sample = 0 if begins_anew(changes) else manifest.samples_seen
    start = Start(manifest.step, manifest.tokens_seen, layout, changes)
    return ResumePlan(
        point,
        checkpoints,
        run_dir,
        tuple(kept_states(manifest.optimizer, manifest.states, context.resolved)),
        (manifest.step, sample),
        manifest.tokens_seen,
        (*manifest.history, start),
    )


def _check_shared(context: RunContext) -> None:
    """Raise LaunchError unless every node sees rank 0's run directory.

    Else a save would write each node's files to its own disk, and no resume would find them all.
    """
    path, device = context.path, context.device

    def create() -> str:
        name = f"seen_by_all_nodes_{uuid.uuid4().hex}"
        (path / name).touch()
        return name

    name = run_on_rank0(create, device)

    def look() -> None:
        deadline = time.monotonic() + SHARED_FILE_S
        while context.world.local_rank == 0 and not (path / name).exists():
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{socket.gethostname()}: --run_dir {path}: is not rank 0's directory: name one"
                    " on a file system that all nodes share, by the same path"
                )
            time.sleep(0.1)

    try:
        run_on_all(look, device)
    finally:
        if context.world.is_rank0:
            (path / name).unlink()


def _choose_checkpoint(
    context: RunContext, checkpoints: Checkpoints, resume: str
) -> ResumePoint | None:
    # 1. no path: nothing, or the newest usable checkpoint of this run
    if resume == "none":
        return None
    if resume == "auto":
        point = checkpoints.find()
        if point is None:
            context.print(f"no checkpoint in {checkpoints.root}: starting at step 0")
        return point
    # 2. a path: one checkpoint, or the newest usable one of a run directory
    path = _without_links(Path(resume))
    named = run_on_rank0(lambda: _named_checkpoint(path), context.device)
    path = path.parent / named if named else path
    run_on_rank0(lambda: _check_resume_path(resume, path), context.device)
    if NAME.fullmatch(path.name):
        root, only = path.parent, path
    else:
        root, only = path if path.name == "checkpoints" else path / "checkpoints", None
    # 3. this run's own directory under another spelling is this run
    if root == _without_links(checkpoints.root):
        root = checkpoints.root
        only = root / only.name if only else None
    source = Checkpoints(root, context.world, context.device, checkpoints.options)
    point = source.find(only)
    if point is None:
        raise CheckpointError(
            f"--resume {resume}: no checkpoint there; name a run directory or one of its"
            " checkpoints/step_NNNNNNNN, or use --resume auto"
        )
    steps = context.resolved.run.train.steps
    if root != checkpoints.root and point.manifest.step > steps:
        raise CheckpointError(f"{point.path}: is beyond the last step {steps}: raise --steps")
    return point


def _named_checkpoint(path: Path) -> str | None:
    """The checkpoint that the file `latest` or `best` names; None: the path is no such file."""
    return path.read_text().strip() if path.name in (LATEST, BEST) and path.is_file() else None


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


def claim_run_dir(context: RunContext, plan: ResumePlan) -> None:
    """Make the run directory this run's: continue the run in it, or move that one away.

    Called right before training, so that a run that fails to start changes nothing.
    """
    point, checkpoints, run_dir = plan.resume_point, plan.checkpoints, plan.run_dir

    def claim() -> str | None:
        """Returns what became of an earlier run."""
        assert run_dir is not None  # on rank 0
        if point is not None and point.path.parent == checkpoints.root:
            run_dir.truncate_metrics(point.manifest.step)
            renamed = checkpoints.rename_newer(point.manifest.step)
            text = f"later checkpoints are now {', '.join(renamed)}" if renamed else None
        else:
            moved = run_dir.move_earlier_run()
            text = None if moved is None else f"earlier run moved to {moved}"
        checkpoints.prepare()
        run_dir.write_json("config.json", context.resolved.to_json())
        return text

    if (text := run_on_rank0(claim, context.device)) is not None:
        context.print(text)
    if point is not None:
        _print_resume(context, plan, point)


def _print_resume(context: RunContext, plan: ResumePlan, point: ResumePoint) -> None:
    """Print where the run goes on, and everything that differs from the checkpoint."""
    manifest = point.manifest
    for reason in point.rejected:
        context.print(f"unusable checkpoint skipped: {reason}", "bold red")
    context.print(f"resuming from {point.path} at step {manifest.step}")
    # 1. layout and configuration
    before, now = manifest.history[-1].layout, plan.history[-1].layout
    changes = changed_settings(before, now, "layout.")
    saved, current = manifest.config, context.resolved.to_json()
    for section in ("run", "deepspeed"):
        changes += changed_settings(saved[section], current[section], f"{section}.")
    for change in changes:
        context.print(f"  changed since the checkpoint: {change}")
    # 2. what --allow let differ
    for change in plan.history[-1].changes:
        context.print(f"  allowed to differ: {change}")
    if plan.history[-1].changes:
        context.print(f"  the data goes on at sample {plan.origin[1]:,}")
    # 3. optimizer states that begin afresh
    optimizer = context.resolved.deepspeed["optimizer"]["type"]
    if manifest.step > 0 and not plan.states and _state_names(context):
        has = f"those of {manifest.optimizer}" if manifest.states else "none"
        text = f"  the states of {optimizer} begin afresh: the checkpoint has {has}"
        context.print(text, "bold red")
    elif manifest.states and (new := set(_state_names(context)) - set(manifest.states)):
        context.print(f"  begins afresh: {', '.join(sorted(new))} of {optimizer}", "bold red")
    # 4. the schedule
    if text := _schedule_change(context, manifest):
        context.print(f"  {text}")


def _state_names(context: RunContext) -> Sequence[str]:
    """The optimizer states of this run."""
    settings = context.resolved.settings
    assert settings.optimizer is not None  # resolved
    return settings.optimizer.state_names(settings.optimizer_params)


def _schedule_change(context: RunContext, manifest: Manifest) -> str:
    """What becomes of the learning rate, if the run is longer or its schedule another than before;
    else nothing.
    """
    before, now = manifest.config["deepspeed"], context.resolved.deepspeed
    old_steps, steps = manifest.config["run"]["train"]["steps"], context.resolved.run.train.steps
    sections = [json_.get("scheduler") for json_ in (before, now)]
    if sections[0] == sections[1] and steps <= old_steps:
        return ""
    # 1. the rates of the last step and of the next one
    applied = manifest.step - manifest.progress.skipped_steps
    base = [json_["optimizer"].get("params", {}).get("lr", 1e-3) for json_ in (before, now)]
    try:
        old = learning_rate(sections[0], base[0], max(applied - 1, 0))
        new = learning_rate(sections[1], base[1], applied)
    except KeyError:  # OneCycle: DeepSpeed alone computes it
        return ""
    # 2. why
    longer = f"extended from {old_steps} to {steps} steps: " if steps > old_steps else ""
    kinds = [section["type"] if section else "a constant rate" for section in sections]
    totals = [(s or {}).get("params", {}).get("total_num_steps") for s in sections]
    if sections[0] == sections[1]:
        what = f"the schedule stays as it was ({kinds[1]})"
    elif kinds[0] == kinds[1] and totals[0] != totals[1]:
        what = f"the schedule ({kinds[1]}) is now that of {totals[1]} steps, not of {totals[0]}"
    else:
        what = f"the schedule is {kinds[1]}, it was {kinds[0]}"
    return f"{longer}{what}; the learning rate goes on at {new:.3g}, it was {old:.3g}"


def _without_links(path: Path) -> Path:
    """The absolute path; Path.resolve raises RuntimeError on links that lead to each other."""
    return Path(os.path.realpath(path))
