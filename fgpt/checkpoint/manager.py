"""Checkpoints that are complete or do not exist.

    1. step_N.tmp is created, if the disk has room                 rank 0
    2. every rank copies its part of the state to the host         all ranks
    3. it writes, hashes and fsyncs its file, in a thread          all ranks
    4. at a later step all ranks agree that every write succeeded  all ranks
    5. rank 0 sees every file; manifest.json, fsync; rename to step_N
    6. fsync; `latest`, `best`; checkpoints that need not be kept are removed    rank 0

With `checkpoint.async` off, training waits for 3 and nothing is copied. A failure before the rename
leaves step_N.tmp, removed at once or at the next start; one after it is a warning. `latest` is for
people and scripts; a resume reads manifests only. Kept are the newest `checkpoint.keep`, those of
every `checkpoint.keep_every` steps, and the one that `best` names.
"""

from __future__ import annotations

import errno
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgpt.checkpoint.manifest import (
    Manifest,
    Start,
    check_file,
    check_names,
    read_manifest,
)
from fgpt.checkpoint.reader import CheckpointReader
from fgpt.checkpoint.tensor_file import (
    Part,
    SavedFile,
    TensorRecord,
    copy_to_host,
    file_header,
    parts_of,
    stream,
    write_file,
)
from fgpt.config.schema import CheckpointConfig
from fgpt.distributed.agreements import gather_json, run_on_all, run_on_rank0
from fgpt.distributed.launch import World
from fgpt.engine.base import Engine
from fgpt.engine.state import Progress
from fgpt.errors import CheckpointError, FgptError, TrainingError
from fgpt.utils.background import BackgroundCall
from fgpt.utils.fault_injection import fault_point
from fgpt.utils.files import sync_directory, write_atomic

NAME = re.compile(r"step_(\d{8})")
LATEST = "latest"
BEST = "best"
"""File with the name of the checkpoint with the lowest validation loss (`checkpoint.best`)."""
SPARE_BYTES = 1 << 20
"""Free space required beyond the size of the newest checkpoint."""
RETRY_AFTER_S = (0.5, 2.0, 5.0)
"""Pauses before a file that could not be read is read again."""
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors of a damaged checkpoint; all others are the file system's."""


@dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint to resume from."""

    path: Path
    """Its directory."""
    manifest: Manifest
    """Its manifest; the files match it."""
    rejected: tuple[str, ...]
    """Why newer checkpoints are unusable, one line each."""


@dataclass(frozen=True)
class SaveInfo:
    """What a checkpoint says beside its tensors."""

    samples_seen: int
    """See `Manifest`, also for the others."""
    tokens_seen: int
    identity: dict[str, Any]
    config: dict[str, Any]
    optimizer: str
    history: tuple[Start, ...]
    valid_loss: float | None = None


@dataclass
class PendingSave:
    """A save that has begun."""

    info: SaveInfo
    progress: Progress
    final: Path
    partial: Path
    tensors: dict[str, TensorRecord]
    """What this rank's file has."""
    writing: SavedFile | BackgroundCall[SavedFile]
    """This rank's file, or the thread that writes it."""

    def is_written(self) -> bool:
        """Whether `file` returns or raises at once."""
        return isinstance(self.writing, SavedFile) or self.writing.is_done()

    def file(self) -> SavedFile:
        """Wait for this rank's file. Raises OSError if it could not be written."""
        return self.writing if isinstance(self.writing, SavedFile) else self.writing.result()


class Checkpoints:
    """The checkpoints of one run directory. All ranks call every public method together."""

    def __init__(
        self,
        root: Path,
        world: World,
        device: torch.device,
        options: CheckpointConfig,
        warn: Callable[[str], None] = print,
    ):
        """`warn` prints what went wrong after a checkpoint was complete."""
        self.root = root
        self.world = world
        self.device = device
        self.options = options
        self.warn = warn
        self._pending: PendingSave | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        """Host memory for the copy of the state, kept for the next save."""

    def prepare(self) -> None:
        """Create and clean the directory, on rank 0. Raises CheckpointError, OSError."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._remove_partial()
        for path in (self.root / LATEST, self.root / BEST):
            if path.is_dir() and not path.is_symlink():
                raise CheckpointError(f"{path}: is a directory: remove it")
        newest = self.newest()
        if newest is not None:
            self._write_latest(newest)

    def save(self, engine: Engine, info: SaveInfo) -> Path:
        """Write and commit one checkpoint of the engine's current step.

        Raises TrainingError on all ranks if any failed; earlier checkpoints are unchanged.
        """
        self.begin(engine, info, background=False)
        path = self.finish()
        assert path is not None  # one was begun
        return path

    def begin(self, engine: Engine, info: SaveInfo, *, background: bool) -> None:
        """Begin a save of the engine's current step, which `finish` completes.

        `background`: copy the state and write it in a thread; else write it now. Finishes an
        earlier save first. Raises as `save`.
        """
        self.finish()
        progress = engine.progress()
        final = self.root / f"step_{progress.step:08d}"
        partial = final.with_name(final.name + ".tmp")
        rank = self.world.rank

        path = partial / f"rank_{rank:05d}.safetensors"

        def read_state() -> tuple[dict[str, TensorRecord], SavedFile | Callable[[], SavedFile]]:
            """This rank's tensors, and their file or what will write it."""
            fault_point("before_shards", rank, progress.step)
            with engine.saving() as tensors:
                parts, records = parts_of(tensors)
                header = file_header(parts)
                if background:
                    copy = self._copied(parts)
                    return records, lambda: self._write(path, header, [copy], progress.step)
                return records, self._write(path, header, stream(parts), progress.step)

        with self._discarding(progress.step, partial):
            run_on_rank0(lambda: self._create_partial(partial), self.device)
            records, written = run_on_all(read_state, self.device)
        # threads start only now that no rank has failed: a failure leaves none behind
        writing = written if isinstance(written, SavedFile) else BackgroundCall(written)
        self._pending = PendingSave(info, progress, final, partial, records, writing)

    def _copied(self, parts: Sequence[Part]) -> Tensor:
        """Copy this rank's parts to the host; raises OSError if there is no memory."""
        size = sum(part.n_bytes for part in parts)
        try:
            if self._buffer.numel() < size:
                pin = self.device.type == "cuda"
                self._buffer = torch.empty(0, dtype=torch.uint8)  # first release the smaller one
                self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
        except RuntimeError as error:
            raise OSError(errno.ENOMEM, f"{size / 2**20:.0f} MiB for checkpoint.async") from error
        copy_to_host(parts, self._buffer)
        return self._buffer[:size]

    def _write(self, path: Path, header: bytes, data: Iterable[Tensor], step: int) -> SavedFile:
        try:
            file = write_file(path, header, data)
        except OSError as error:
            error.filename = error.filename or str(path)  # write(2) does not name it
            raise
        fault_point("after_shards", self.world.rank, step)
        return file

    @property
    def is_pending(self) -> bool:
        """Whether a save has begun and is not finished."""
        return self._pending is not None

    def is_written(self) -> bool:
        """Whether `finish` would not wait for this rank's file."""
        return self._pending is None or self._pending.is_written()

    def finish(self) -> Path | None:
        """Wait for the save that has begun and commit it; None if there is none.

        Raises TrainingError on all ranks if it failed on any.
        """
        save, self._pending = self._pending, None
        if save is None:
            return None
        step = save.progress.step
        with self._discarding(step, save.partial):
            file = run_on_all(save.file, self.device)
            fault_point("before_manifest", self.world.rank, step)
            records = {name: vars(record) for name, record in save.tensors.items()}
            gathered = gather_json([vars(file), records], self.device)
            every = self.options.keep_every
            manifest = Manifest(
                progress=save.progress,
                files=tuple(SavedFile(**file) for file, _ in gathered),
                tensors=merge_records([records for _, records in gathered]),
                is_permanent=every > 0 and step % every == 0,
                **vars(save.info),
            )
            run_on_rank0(lambda: self._commit(manifest, save.partial, save.final), self.device)
        return save.final

    @contextmanager
    def _discarding(self, step: int, partial: Path) -> Iterator[None]:
        """Remove what a failed save has written. Raises TrainingError for it."""
        try:
            yield
        except FgptError as error:
            if self.world.is_rank0:
                shutil.rmtree(partial, ignore_errors=True)
            kept = self.newest()
            still = f"{kept.name} is unchanged" if kept else "no earlier checkpoint exists"
            raise TrainingError(f"step {step}: checkpoint not saved: {error}; {still}") from error

    def _create_partial(self, partial: Path) -> None:
        """Create the directory of a save. Raises TrainingError if the disk is too full."""
        self.root.mkdir(parents=True, exist_ok=True)
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
        partial.mkdir()

    def _commit(self, manifest: Manifest, partial: Path, final: Path) -> None:
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
        fault_point("before_rename", self.world.rank, manifest.step)
        if final.exists():  # unusable: a resume has rejected it
            _set_aside(final)
        partial.rename(final)
        # 3. only now may `latest` move and older checkpoints go; the new one is safe already
        try:
            sync_directory(self.root)
            fault_point("before_latest", self.world.rank, manifest.step)
            self._write_latest(final)
            self._update_best(manifest, final)
            replaced = [p for p in self.root.glob("step_*.old") if p.stem <= final.name]
            for old in [*self._surplus(), *replaced]:
                shutil.rmtree(old)
        except OSError as error:
            self.warn(f"{final} is saved; {error.filename or self.root}: {error.strerror}")

    def _write_latest(self, path: Path) -> None:
        write_atomic(self.root / LATEST, f"{path.name}\n".encode())

    def _update_best(self, manifest: Manifest, path: Path) -> None:
        """Name this checkpoint in `best` if its validation loss is the lowest."""
        lowest = self.lowest_valid_loss()
        if self.options.best and manifest.valid_loss is not None:
            if lowest is None or manifest.valid_loss < lowest:
                write_atomic(self.root / BEST, f"{path.name}\n".encode())

    def best(self) -> Path | None:
        """Return the checkpoint that `best` names, not verified; None if there is none."""
        try:
            path = self.root / (self.root / BEST).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        return path if path in self.complete() else None

    def lowest_valid_loss(self) -> float | None:
        """The validation loss of `best`; None if there is none that can be read."""
        try:
            best = self.best()
            return None if best is None else read_manifest(best).valid_loss
        except (CheckpointError, OSError):
            return None

    def _surplus(self) -> list[Path]:
        """The checkpoints that need not be kept; a later start keeps what an earlier one kept."""
        best = self.best()

        def is_kept(path: Path) -> bool:
            try:
                return path == best or read_manifest(path).is_permanent
            except (CheckpointError, OSError):
                return False

        return [path for path in self.complete()[self.options.keep :] if not is_kept(path)]

    def _remove_partial(self) -> None:
        for leftover in self.root.glob("step_*.tmp"):
            shutil.rmtree(leftover)

    def rename_newer(self, step: int) -> list[str]:
        """Rename checkpoints of later steps, which will be trained again, to *.old; on rank 0.

        Returns the new names.
        """
        later = [path for path in self.complete() if _step_of(path) > step]
        return [_set_aside(path).name for path in reversed(later)]

    def complete(self) -> list[Path]:
        """Return the directories with a checkpoint's name, newest first; not verified."""
        named = [path for path in self.root.glob("step_*") if NAME.fullmatch(path.name)]
        directories = (path for path in named if path.is_dir() and not path.is_symlink())
        return sorted(directories, reverse=True)

    def newest(self) -> Path | None:
        """Return the newest checkpoint, not verified; None if there is none."""
        return next(iter(self.complete()), None)

    def find(self, only: Path | None = None) -> ResumePoint | None:
        """Return the newest checkpoint whose files match its manifest; None if none exists yet.

        `only`: consider this one alone. Raises CheckpointError if all that exist are unusable, or
        if a file cannot be read: that is no damage, and no older checkpoint is taken instead.
        """
        # 1. rank 0 lists the candidates, so that all ranks check the same ones
        candidates = run_on_rank0(
            lambda: [str(path) for path in ([only] if only else self.complete())], self.device
        )
        rejected: list[str] = []
        for path in map(Path, candidates):
            # 2. each rank checks its share of the files; one problem rejects the checkpoint
            problems = [p for p in gather_json(self._problem(path), self.device) if p is not None]
            if unreadable := [text for text, is_damage in problems if not is_damage]:
                raise CheckpointError(
                    f"{unreadable[0]}: the checkpoint cannot be read now, and is kept: check the"
                    " file system and start again"
                )
            if not problems:
                return ResumePoint(path, read_manifest(path), tuple(rejected))
            rejected.append(problems[0][0])
        # 3. never start afresh silently
        if rejected:
            raise CheckpointError(
                "no usable checkpoint: "
                + "; ".join(rejected)
                + "; start afresh with --resume none (the old run is renamed, not deleted)"
            )
        return None

    def _problem(self, path: Path) -> tuple[str, bool] | None:
        """What is wrong with this rank's share of a checkpoint, and whether that is damage."""
        for pause_s in (*RETRY_AFTER_S, None):
            try:
                manifest = read_manifest(path)
                rank, ranks = self.world.rank, self.world.size
                if rank == 0:
                    check_names(path, manifest.files)
                reader = CheckpointReader(path, manifest)  # every tensor is complete
                for number in range(rank, len(manifest.files), ranks):
                    check_file(path, manifest.files[number])
                    reader.check_file(number)
                return None
            except (CheckpointError, *MISSING) as error:
                return str(error), True
            except OSError as error:
                problem = f"{error.filename or path}: {error.strerror}", False
            if pause_s is not None:
                time.sleep(pause_s)
        return problem

    def load(self, engine: Engine, point: ResumePoint, states: Sequence[str]) -> None:
        """Load a checkpoint of any layout into the engine, with these optimizer states.

        Raises CheckpointError on all ranks if it fails on any.
        """
        progress = point.manifest.progress
        if not states:
            progress = replace(progress, updates=0)
        reader = CheckpointReader(point.path, point.manifest)
        with engine.restoring(progress, states) as tensors:
            run_on_all(lambda: reader.fill(tensors), self.device)


def merge_records(of_ranks: Sequence[dict[str, Any]]) -> dict[str, TensorRecord]:
    """Return the tensors of a checkpoint from those in each rank's file (records as JSON)."""
    merged: dict[str, TensorRecord] = {}
    for number, records in enumerate(of_ranks):
        for name, record in records.items():
            whole = merged.setdefault(
                name, TensorRecord(tuple(record["shape"]), record["states"], [])
            )
            whole.boxes += [[number, *box] for box in record["boxes"]]
    return dict(sorted(merged.items()))


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint to *.old, which the next one of its step or a later one removes."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    return path.rename(old)
