"""The directory of a run's checkpoints, as rank 0 sees it: names, what is complete, what is kept.

    step_00000200/        complete: it has a manifest and was renamed
    step_00000300.tmp/    incomplete
    step_00000400.old/    later than the step that a run resumed from
    latest, best          names of checkpoints, for people and scripts

Kept are the newest `checkpoint.keep`, those of every `checkpoint.keep_every` steps, and the one
that `best` names.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from fgpt.checkpoint.manifest import Manifest, read_manifest
from fgpt.config.schema import CheckpointConfig
from fgpt.errors import CheckpointError, TrainingError
from fgpt.utils.fault_injection import fault_point
from fgpt.utils.files import check_writable, read_regular, sync_directory, write_atomic

NAME = re.compile(r"step_([0-9]{8,})")
LATEST = "latest"
BEST = "best"
"""File with the name of the checkpoint with the lowest validation loss (`checkpoint.best`)."""
SPARE_BYTES = 1 << 20
"""Free space required beyond the size of the newest checkpoint."""


class CheckpointDirectory:
    """The checkpoints below one path; nothing is cached."""

    def __init__(self, root: Path):
        self.root = root

    # ---- what is there -------------------------------------------------------------------------

    def path(self, step: int) -> Path:
        """The checkpoint of a step, whether it exists or not."""
        return self.root / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """Where the checkpoint of a step is written."""
        return self.root / f"step_{step:08d}.tmp"

    def complete(self) -> list[Path]:
        """Return the directories with a checkpoint's name, newest first; not verified."""
        named = [path for path in self.root.glob("step_*") if NAME.fullmatch(path.name)]
        directories = (path for path in named if path.is_dir() and not path.is_symlink())
        return sorted(directories, key=step_of, reverse=True)

    def newest(self) -> Path | None:
        """Return the newest checkpoint, not verified; None if there is none."""
        return next(iter(self.complete()), None)

    def best(self) -> Path | None:
        """Return the checkpoint that `best` names, not verified; None if there is none."""
        try:
            path = self.root / read_regular(self.root / BEST).decode().strip()
        except (OSError, UnicodeDecodeError):
            return None
        return path if path in self.complete() else None

    def lowest_valid_loss(self) -> float | None:
        """The validation loss of `best`; None if there is none that can be read."""
        try:
            best = self.best()
            loss = None if best is None else read_manifest(best).valid_loss
            return loss if loss is not None and math.isfinite(loss) else None
        except (CheckpointError, OSError):
            return None

    # ---- at the start of a run -----------------------------------------------------------------

    def prepare(self) -> None:
        """Create and clean the directory. Raises CheckpointError, OSError."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            check_writable(self.root)
        except OSError as error:
            raise CheckpointError(
                f"{self.root}: {error.strerror}: make it writable, or choose another --run_dir"
            ) from error
        self._remove_partial()
        for name in (LATEST, BEST, f"{LATEST}.tmp", f"{BEST}.tmp"):
            if (path := self.root / name).is_dir() and not path.is_symlink():
                raise CheckpointError(f"{path}: is a directory: remove it")
        newest = self.newest()
        if newest is not None:
            self._write_latest(newest)

    def rename_newer(self, step: int) -> list[str]:
        """Rename checkpoints of later steps, which will be trained again, to *.old.

        Returns the new names.
        """
        later = [path for path in self.complete() if step_of(path) > step]
        return [_set_aside(path).name for path in reversed(later)]

    # ---- a save --------------------------------------------------------------------------------

    def create_partial(self, step: int) -> None:
        """Create `partial(step)`. Raises TrainingError if the disk is too full, OSError."""
        if not self.root.parent.is_dir():
            raise TrainingError(f"{self.root.parent}: the run directory is gone: was it renamed?")
        self.root.mkdir(exist_ok=True)
        self._remove_partial()
        needed = SPARE_BYTES
        newest = self.newest()
        if newest is not None:
            needed += sum(entry.stat().st_size for entry in newest.iterdir())
        free = shutil.disk_usage(self.root).free
        if free < needed:
            missing = -(-(needed - free) // 2**20)
            raise TrainingError(
                f"{self.root}: No space left on device: {free / 2**20:.1f} MiB are free, about"
                f" {missing} MiB too few"
            )
        self.partial(step).mkdir()

    def remove_partial(self, step: int) -> None:
        """Remove what a failed save has written."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def commit(
        self, manifest: Manifest, options: CheckpointConfig, warn: Callable[[str], None]
    ) -> None:
        """Make a checkpoint of the files in `partial`, which are those of the manifest.

        `warn` prints what goes wrong once it is complete. Raises TrainingError, OSError before.
        """
        step = manifest.step
        partial, final = self.partial(step), self.path(step)
        # 1. a rank that writes to another file system would have saved nothing
        for file in manifest.files:
            path = partial / file.name
            if not path.is_file() or path.stat().st_size != file.size_bytes:
                raise TrainingError(
                    f"{path}: was written, but rank 0 does not see it: all nodes must share the run"
                    " directory"
                )
        # 2. the manifest makes the directory complete, the rename makes it a checkpoint
        manifest.write(partial)
        fault_point("before_rename", 0, step)
        if final.exists():  # unusable: a resume has rejected it
            _set_aside(final)
        partial.rename(final)
        # 3. only now may `latest` move and older checkpoints go; the new one is safe already
        try:
            sync_directory(self.root)
            fault_point("before_latest", 0, step)
            self._write_latest(final)
            if options.best:
                self._update_best(manifest, final)
            replaced = [
                path
                for path in self.root.glob("step_*.old")
                if NAME.fullmatch(path.stem) and step_of(path) <= step
            ]
            for old in [*self._surplus(options.keep), *replaced]:
                shutil.rmtree(old)
        except OSError as error:
            reason = error.strerror or error
            warn(f"{final} is saved; {error.filename or self.root}: {reason}")

    def _write_latest(self, path: Path) -> None:
        write_atomic(self.root / LATEST, f"{path.name}\n".encode())

    def _update_best(self, manifest: Manifest, path: Path) -> None:
        """Name this checkpoint in `best` if its validation loss is the lowest."""
        lowest, loss = self.lowest_valid_loss(), manifest.valid_loss
        if loss is not None and math.isfinite(loss) and (lowest is None or loss < lowest):
            write_atomic(self.root / BEST, f"{path.name}\n".encode())

    def _surplus(self, keep: int) -> list[Path]:
        """The checkpoints that need not be kept; a later start keeps what an earlier one kept."""
        best = self.best()

        def is_kept(path: Path) -> bool:
            try:
                return path == best or read_manifest(path).is_permanent
            except (CheckpointError, OSError):
                return False

        return [path for path in self.complete()[keep:] if not is_kept(path)]

    def _remove_partial(self) -> None:
        for leftover in self.root.glob("step_*.tmp"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def locate(path: Path) -> tuple[CheckpointDirectory, Path | None]:
    """Return what a path names: a run, its checkpoints/, one of them, or its `latest` or `best`.

    The second value is the checkpoint; None: a run. Nothing is checked but the files `latest` and
    `best`. Raises OSError if one cannot be read.
    """
    path = Path(os.path.abspath(path)) if path.name in ("", "..") else path  # "." has no name
    if path.name in (LATEST, BEST) and path.is_file():
        named = read_regular(path).decode(errors="replace").strip()
        path = path.parent / named if NAME.fullmatch(named) else path
    if NAME.fullmatch(path.name):
        return CheckpointDirectory(path.parent), path
    return CheckpointDirectory(path if path.name == "checkpoints" else path / "checkpoints"), None


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.removeprefix("step_").removesuffix(".old"))


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint to *.old, which the next one of its step or a later one removes."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    return path.rename(old)
