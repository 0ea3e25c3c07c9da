"""Checkpoints that are complete or do not exist.

    1. step_N.tmp is created, if the disk has room                 rank 0
    2. every rank copies its part of the state to the host         all ranks
    3. it writes, hashes and fsyncs its file, in a thread          all ranks
    4. at a later step all ranks agree that every write succeeded  all ranks
    5. rank 0 sees every file; manifest.json, fsync; rename to step_N
    6. fsync; `latest`, `best`; checkpoints that need not be kept are removed    rank 0

With `checkpoint.async` off, training waits for 3 and nothing is copied. A failure before the rename
leaves step_N.tmp, removed at once or at the next start; one after it is a warning. `latest` is for
people and scripts; a resume reads manifests only. 1, 5 and 6 are in `fgpt.checkpoint.directory`.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fgpt.checkpoint.directory import CheckpointDirectory
from fgpt.checkpoint.manifest import Manifest, SaveInfo, merge_records, read_manifest
from fgpt.checkpoint.reader import CheckpointReader, open_intact
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
from fgpt.engine.state import EMA, Progress
from fgpt.errors import CheckpointError, FgptError, TrainingError
from fgpt.utils.background import BackgroundCall
from fgpt.utils.fault_injection import fault_point

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


@dataclass
class PendingSave:
    """A save that has begun."""

    info: SaveInfo
    progress: Progress
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
        self.directory = CheckpointDirectory(root)
        self.world = world
        self.device = device
        self.options = options
        self.warn = warn
        self._pending: PendingSave | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        """Host memory for the copy of the state, kept for the next save."""

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
        progress, rank = engine.progress(), self.world.rank
        step = progress.step
        path = self.directory.partial(step) / f"rank_{rank:05d}.safetensors"

        def read_state() -> tuple[dict[str, TensorRecord], SavedFile | Callable[[], SavedFile]]:
            """This rank's tensors, and their file or what will write it."""
            fault_point("before_shards", rank, step)
            with engine.saving() as tensors:
                parts, records = parts_of(tensors)
                header = file_header(parts)
                if background:
                    copy = self._copied(parts)
                    return records, lambda: self._write(path, header, [copy], step)
                return records, self._write(path, header, stream(parts), step)

        with self._discarding(step):
            run_on_rank0(lambda: self.directory.create_partial(step), self.device)
            records, written = run_on_all(read_state, self.device)
        # threads start only now that no rank has failed: a failure leaves none behind
        writing = written if isinstance(written, SavedFile) else BackgroundCall(written)
        self._pending = PendingSave(info, progress, records, writing)

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
        with self._discarding(step):
            file = run_on_all(save.file, self.device)
            fault_point("before_manifest", self.world.rank, step)
            records = {name: record.to_json() for name, record in save.tensors.items()}
            gathered = gather_json([vars(file), records], self.device)
            every = self.options.keep_every
            manifest = Manifest(
                **vars(save.info),
                progress=save.progress,
                files=tuple(SavedFile(**file) for file, _ in gathered),
                tensors=merge_records([records for _, records in gathered]),
                is_permanent=every > 0 and step % every == 0,
            )
            run_on_rank0(
                lambda: self.directory.commit(manifest, self.options, self.warn), self.device
            )
        return self.directory.path(step)

    @contextmanager
    def _discarding(self, step: int) -> Iterator[None]:
        """Remove what a failed save has written. Raises TrainingError for it."""
        try:
            yield
        except FgptError as error:
            if self.world.is_rank0:
                self.directory.remove_partial(step)
            kept = self.directory.newest()
            still = f"{kept.name} is unchanged" if kept else "no earlier checkpoint exists"
            raise TrainingError(f"step {step}: checkpoint not saved: {error}; {still}") from error

    def find(self, only: Path | None = None) -> ResumePoint | None:
        """Return the newest checkpoint whose files match its manifest; None if none exists yet.

        `only`: consider this one alone. Raises CheckpointError if all that exist are unusable, or
        if a file cannot be read: that is no damage, and no older checkpoint is taken instead.
        """
        # 1. rank 0 lists the candidates, so that all ranks check the same ones
        candidates = run_on_rank0(
            lambda: [str(path) for path in ([only] if only else self.directory.complete())],
            self.device,
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
                open_intact(path, self.world.rank, self.world.size)
                return None
            except (CheckpointError, *MISSING) as error:
                return str(error), True
            except OSError as error:
                problem = f"{error.filename or path}: {error.strerror or error}", False
            if pause_s is not None:
                time.sleep(pause_s)
        return problem

    def load(self, engine: Engine, point: ResumePoint, states: Sequence[str]) -> None:
        """Load a checkpoint of any layout into the engine, with these optimizer states.

        Raises CheckpointError on all ranks if it fails on any.
        """
        progress = point.manifest.progress
        if not {*states} - {EMA}:
            progress = replace(progress, updates=0)
        reader = CheckpointReader(point.path, point.manifest)

        def fill() -> None:
            try:
                reader.fill(tensors)
            except OSError as error:  # the run that it belongs to removes old checkpoints
                raise CheckpointError(
                    f"{error.filename or point.path}: {error.strerror or error}, while it was"
                    " loaded: name a checkpoint that its run keeps, or wait until it has ended"
                ) from error

        with engine.restoring(progress, states) as tensors:
            run_on_all(fill, self.device)
