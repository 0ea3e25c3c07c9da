"""Before the first step: agreement, data, the run directory, and what to resume from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from fgpt.checkpoint.identity import changed_settings, check_identity
from fgpt.checkpoint.manager import NAME, Checkpoints, ResumePoint
from fgpt.config.field_syntax import parse_blend
from fgpt.config.resolve import Resolved
from fgpt.data.card import CARD_NAME
from fgpt.data.token_dataset import BlendedDataset, open_blended_dataset
from fgpt.distributed.agreements import gather_json, run_on_all, run_on_rank0
from fgpt.distributed.launch import PATIENT_TIMEOUT, World
from fgpt.errors import CheckpointError, DataError, LaunchError
from fgpt.train.run_dir import RunDir


@dataclass(frozen=True)
class RunContext:
    """What a run knows before it has data or an engine."""

    resolved: Resolved
    """The configuration."""
    world: World
    """This rank's place."""
    device: torch.device
    """This rank's device."""
    console: Console
    """Prints on rank 0 only."""

    def say(self, text: str, style: str | None = None) -> None:
        """Print one line as it is: a path may hold what rich takes for markup."""
        self.console.print(text, style=style, highlight=False, markup=False)

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(str(self.resolved.run.run_dir))


@dataclass(frozen=True)
class ResumePlan:
    """Where a run begins."""

    found: ResumePoint | None
    """The checkpoint to load, or None for initial weights."""
    checkpoints: Checkpoints
    """The run directory's checkpoints."""
    run_dir: RunDir | None
    """Rank 0's hold on the run directory; None on the other ranks."""


def check_agreement(context: RunContext) -> None:
    """Raise LaunchError unless every rank resolved the very same configuration."""
    prints = gather_json(context.resolved.fingerprint(), context.device)
    if len(set(prints)) > 1:
        odd = next(rank for rank, p in enumerate(prints) if p != prints[0])
        raise LaunchError(
            f"ranks 0 and {odd} read different configurations: give every node the same files"
        )


def open_data(context: RunContext) -> BlendedDataset:
    """Open the data sets on every rank; rank 0 prepares a single one first if there is none."""
    data, device = context.resolved.run.data, context.device

    def prepare_on_leader() -> None:
        named = parse_blend(data.path)
        if len(named) == 1 and not (Path(named[0].path) / CARD_NAME).exists():
            from fgpt.prepare.pipeline import ensure_prepared  # not imported by other runs

            ensure_prepared(named[0].path, data.recipe)

    patient = dist.new_group(backend="gloo", timeout=PATIENT_TIMEOUT)
    run_on_rank0(prepare_on_leader, torch.device("cpu"), patient)
    dist.destroy_process_group(patient)

    def open_and_check() -> BlendedDataset:
        dataset = open_blended_dataset(data.path)
        dataset.check_fits(context.resolved.run.model.vocab_size)
        try:
            dataset.tokenizer.encode(context.resolved.run.sample.prompt)
        except DataError as error:
            raise DataError(f"sample.prompt: {error}; write it in UTF-8") from error
        return dataset

    return run_on_all(open_and_check, device)


def begin(context: RunContext, resume: str, identity: dict[str, Any]) -> ResumePlan:
    """Take the run directory and choose the checkpoint; nothing is changed there yet.

    `resume`: none, auto, or a path (see `fgpt.train.run.run`). Raises CheckpointError, LaunchError.
    """
    world, device = context.world, context.device
    run_dir = run_on_all(lambda: RunDir(context.path) if world.is_rank0 else None, device)
    keep = context.resolved.run.checkpoint.keep
    checkpoints = Checkpoints(context.path / "checkpoints", world, device, keep)
    found = _choose(context, checkpoints, resume)
    if found is not None:
        check_identity(found.manifest.identity, identity, str(found.path))
    return ResumePlan(found, checkpoints, run_dir)


def claim_run_dir(context: RunContext, start: ResumePlan) -> None:
    """Make the run directory this run's: an earlier one is moved aside, or cut back and continued.

    Called when nothing but training is left to do, so that a run that cannot start changes nothing.
    """
    found, checkpoints, run_dir = start.found, start.checkpoints, start.run_dir

    def tidy() -> str | None:
        assert run_dir is not None  # the leader's
        aside = None
        if found is not None and found.path.parent == checkpoints.root:
            run_dir.forget_metrics_after(found.manifest.step)
            checkpoints.set_aside_newer(found.manifest.step)
        else:
            aside = run_dir.start_afresh()
        checkpoints.prepare()
        run_dir.write_json("config.json", context.resolved.to_json())
        return None if aside is None else str(aside)

    aside = run_on_rank0(tidy, context.device)
    if aside is not None:
        context.say(f"an earlier run was here: moved to {aside}")
    _tell(context, found)


def _choose(context: RunContext, checkpoints: Checkpoints, resume: str) -> ResumePoint | None:
    if resume == "none":
        return None
    if resume == "auto":
        return checkpoints.find()
    path = Path(resume).resolve()
    if NAME.fullmatch(path.name):
        home, only = path.parent, path
    else:
        home, only = path / "checkpoints", None
    if home == checkpoints.root.resolve():
        home = checkpoints.root  # so that the run knows itself
        only = home / only.name if only else None
    source = Checkpoints(home, context.world, context.device, checkpoints.keep)
    found = source.find(only)
    if found is None:
        raise CheckpointError(
            f"--resume {resume}: no checkpoint there; name a run directory, or one of its"
            " checkpoints/step_NNNNNNNN, or use --resume auto"
        )
    return found


def _tell(context: RunContext, found: ResumePoint | None) -> None:
    if found is None:
        return
    for reason in found.skipped:
        context.say(f"checkpoint passed over: {reason}", "bold red")
    context.say(f"resuming from {found.path} at step {found.manifest.step}")
    old, new = found.manifest.config, context.resolved.to_json()
    for part in ("run", "deepspeed"):
        for change in changed_settings(old[part], new[part], f"{part}."):
            context.say(f"  changed since: {change}")
