"""Checkpoints that are complete or do not exist.

    save    step_N.tmp is made and checked for room          rank 0
            every rank writes, hashes and syncs its files    all ranks
            all agree that they have                         all ranks
            manifest.json, rename to step_N, then `latest`   rank 0
            the oldest beyond `keep` go                      rank 0

A failure anywhere before the rename leaves step_N.tmp, removed at once or at the next start.
`latest` is for people and scripts; resuming believes manifests only.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fgpt.checkpoint.manifest import Manifest, check_files, read_manifest
from fgpt.distributed.agreements import any_rank, gather_json, run_on_all, run_on_rank0
from fgpt.distributed.launch import World
from fgpt.engine.base import Engine, SavedFile
from fgpt.engine.tensor_files import refuse_code
from fgpt.errors import CheckpointError, FgptError, TrainingError
from fgpt.utils.fault_injection import fault_point
from fgpt.utils.files import sync_directory, write_atomic

NAME = re.compile(r"step_(\d{8})")
LATEST = "latest"
SPARE_BYTES = 1 << 20


@dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint to resume from."""

    path: Path
    """Its directory."""
    manifest: Manifest
    """Its manifest, already compared with the files."""
    skipped: tuple[str, ...]
    """Newer ones that were passed over, and why."""


class Checkpoints:
    """The checkpoints of one run directory. Every method is called by all ranks together."""

    def __init__(self, root: Path, world: World, device: torch.device, keep: int):
        self.root = root
        self.world = world
        self.device = device
        self.keep = keep

    def prepare(self) -> None:
        """Make the directory ready before the first step. Raises CheckpointError, OSError."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._remove_partial()
        latest = self.root / LATEST
        if latest.is_dir() and not latest.is_symlink():
            raise CheckpointError(f"{latest}: is a directory: remove it")
        self._point_at(self.newest())

    def save(self, engine: Engine, samples_seen: int, identity: Any, config: Any) -> Path:
        """Write and commit one checkpoint of the engine's current step.

        Raises TrainingError on all ranks if any of them failed; what was there before stays.
        """
        step, rank = engine.step, self.world.rank
        final = self.root / f"step_{step:08d}"
        partial = final.with_name(final.name + ".tmp")
        try:
            run_on_rank0(lambda: self._make_room(partial), self.device)
            mine = run_on_all(lambda: self._write(engine, partial), self.device)
            fault_point("before_manifest", rank, step)
            files = [
                SavedFile(*entry)
                for part in gather_json(
                    [[f.name, f.size_bytes, f.sha256] for f in mine], self.device
                )
                for entry in part
            ]
            manifest = Manifest(step, samples_seen, identity, config, tuple(files))
            run_on_rank0(lambda: self._commit(manifest, partial, final), self.device)
        except FgptError as error:
            if self.world.is_rank0:
                shutil.rmtree(partial, ignore_errors=True)
            raise TrainingError(f"step {step}: checkpoint not saved: {error}") from error
        return final

    def _make_room(self, partial: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._remove_partial()
        newest = self.newest()
        need = SPARE_BYTES
        if newest is not None:
            need += sum(entry.stat().st_size for entry in newest.iterdir())
        free = shutil.disk_usage(self.root).free
        if free < need:
            raise TrainingError(
                f"{self.root}: {free >> 20} MiB free, about {need >> 20} MiB needed"
            )
        partial.mkdir()

    def _write(self, engine: Engine, partial: Path) -> list[SavedFile]:
        fault_point("before_shards", self.world.rank, engine.step)
        files = engine.save(partial)
        fault_point("after_shards", self.world.rank, engine.step)
        return files

    def _commit(self, manifest: Manifest, partial: Path, final: Path) -> None:
        manifest.write(partial)
        fault_point("before_rename", self.world.rank, manifest.step)
        if final.exists():  # a damaged one that a resume has passed over
            shutil.rmtree(final)
        partial.rename(final)
        sync_directory(self.root)
        fault_point("before_latest", self.world.rank, manifest.step)
        self._point_at(final)
        passed = [p for p in self.root.glob("step_*.old") if p.stem <= final.name]
        for old in [*self._complete()[self.keep :], *passed]:
            shutil.rmtree(old)

    def _point_at(self, path: Path | None) -> None:
        """Move `latest`, whole or not at all."""
        if path is None:
            return
        write_atomic(self.root / LATEST, f"{path.name}\n".encode())

    def _remove_partial(self) -> None:
        for leftover in self.root.glob("step_*.tmp"):
            shutil.rmtree(leftover)

    def set_aside_newer(self, step: int) -> None:
        """Rename checkpoints of later steps, which are about to be taken again, to *.old."""
        for path in self._complete():
            if int(path.name.removeprefix("step_")) > step:
                old = path.with_name(path.name + ".old")
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)

    def _complete(self) -> list[Path]:
        """Directories with a manifest's name on them, newest first."""
        names = [path for path in self.root.glob("step_*") if NAME.fullmatch(path.name)]
        real = (path for path in names if path.is_dir() and not path.is_symlink())
        return sorted(real, reverse=True)

    def newest(self) -> Path | None:
        """The newest directory with a checkpoint's name, unverified."""
        return next(iter(self._complete()), None)

    def find(self, only: Path | None = None) -> ResumePoint | None:
        """The newest checkpoint whose files are what its manifest says; None if there is none yet.

        `only`: that one or none. Raises CheckpointError if there are some, but all are damaged.
        """
        candidates = run_on_rank0(
            lambda: [str(path) for path in ([only] if only else self._complete())], self.device
        )
        skipped: list[str] = []
        for path in map(Path, candidates):
            problems = gather_json(self._problem(path), self.device)
            problem = next((p for p in problems if p is not None), None)
            if problem is None:
                return ResumePoint(path, read_manifest(path), tuple(skipped))
            skipped.append(problem)
        if skipped:
            raise CheckpointError(
                "no usable checkpoint: "
                + "; ".join(skipped)
                + "; start afresh with --resume none (the old run is kept beside the new one)"
            )
        return None

    def _problem(self, path: Path) -> str | None:
        try:
            manifest = read_manifest(path)
            share, of = self.world.rank, self.world.size
            check_files(path, manifest, share, of)
            for entry in manifest.files[share::of]:
                refuse_code(path / entry.name)
        except (CheckpointError, OSError) as error:
            return str(error)
        return None

    def load(self, engine: Engine, found: ResumePoint) -> None:
        """Load a found checkpoint into the engine.

        A rank that cannot raises, and ends: DeepSpeed's ranks meet inside, so none can wait for it.
        """
        engine.load(found.path)
        if any_rank(engine.step != found.manifest.step, self.device):
            raise CheckpointError(
                f"{found.path}: the engine is at step {engine.step} after loading step"
                f" {found.manifest.step}"
            )
