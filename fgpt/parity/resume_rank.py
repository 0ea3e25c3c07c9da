"""One rank of `fgpt resume-check`: trains runs and records what each of them saw. A run leaves

DIR/NAME/                   the run directory: metrics.jsonl, checkpoints/
DIR/NAME/samples_RANK.json  the samples of each step, as the loader handed them to this rank
DIR/NAME/loaded/            a checkpoint of the state right after loading, before the first step
DIR/NAME.error              why it failed
DIR/NAME.log                the trainer's console
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fgpt.checkpoint.manager import Checkpoints, ResumePoint
from fgpt.checkpoint.manifest import SaveInfo
from fgpt.data.loader import MicroBatch, MicroBatches
from fgpt.data.samples import SampleBatch, Samples
from fgpt.distributed.launch import World
from fgpt.distributed.local_ranks import joined_ranks
from fgpt.engine.base import Engine
from fgpt.errors import FgptError, LostRankError
from fgpt.parallel.topology import Grid
from fgpt.parity.resume_layouts import PlannedRun
from fgpt.train.run import Observer, run
from fgpt.train.startup import RunContext

LOADED = "loaded"
"""Directory of the checkpoint of the state as loaded."""
SAMPLES = "samples_{:05d}.json"
"""A rank's file of the samples that it was given."""


def train_runs(runs: Sequence[PlannedRun], world: World) -> int:
    """Train runs one after the other, up to the first that fails; returns its exit code, else 0.

    Raises LaunchError, LostRankError.
    """
    with joined_ranks(world) as device:
        for planned in runs:
            path = Path(str(planned.resolved.run.run_dir))
            log_path = path.with_name(f"{path.name}.log") if world.is_rank0 else os.devnull
            with open(log_path, "w") as log:
                console = Console(file=log, width=160, quiet=not world.is_rank0)
                context = RunContext(planned.resolved, world, device, console)
                code = _train(planned, context)
            if code:
                return code
            gc.collect()  # DeepSpeed's objects form cycles, which keep process groups alive
    return 0


def _train(planned: PlannedRun, context: RunContext) -> int:
    recorder = Recorder(context)
    observer = Observer(recorder.make_batches, recorder.save_loaded)
    try:
        code = run(context, planned.resume, observer=observer)
    except LostRankError:
        raise
    except FgptError as error:
        with suppress(FileExistsError), open(error_file(context.path), "x") as file:
            file.write(str(error))
        return error.exit_code
    recorder.write()
    return code


def is_complete(run_dir: Path) -> bool:
    """Whether a run came to its end."""
    return (run_dir / SAMPLES.format(0)).exists()


def error_file(run_dir: Path) -> Path:
    """Return the file that says why a run failed."""
    return run_dir.with_name(f"{run_dir.name}.error")


class Recorder:
    """Records what a run reads and what it has loaded."""

    def __init__(self, context: RunContext):
        self.context = context
        self.steps: dict[int, list[tuple[int, str]]] = {}
        """Step from 1 -> (number, hash of the tokens) of each sample that this rank was given."""

    def make_batches(self, samples: Samples, **options: Any) -> MicroBatches:
        """Return the run's micro-batches, recorded; see `fgpt.train.run.Observer`."""
        return RecordedBatches(samples, self._record, **options)

    def _record(self, step: int, rows: list[tuple[int, str]]) -> None:
        self.steps[step + 1] = rows

    def save_loaded(self, engine: Engine, point: ResumePoint) -> None:
        """Save the state that was just loaded, to be compared with what it was loaded from."""
        context, manifest = self.context, point.manifest
        options = context.resolved.run.checkpoint
        checkpoints = Checkpoints(context.path / LOADED, context.world, context.device, options)
        shared = ("samples_seen", "tokens_seen", "identity", "config", "optimizer", "history")
        info = SaveInfo(**{name: getattr(manifest, name) for name in shared})
        checkpoints.save(engine, info)

    def write(self) -> None:
        """Write this rank's samples."""
        rank = self.context.world.rank
        data_rank = Grid.of(self.context.resolved.batch).coordinates(rank).data
        value = {"data_rank": data_rank, "steps": self.steps}
        (self.context.path / SAMPLES.format(rank)).write_text(json.dumps(value))


class RecordedBatches(MicroBatches):
    """Micro-batches that report which samples they hand out.

    A row is recognized by its tokens, so that the numbers are those of the samples that the step
    was given, not those that a formula says it should be given.
    """

    def __init__(
        self,
        samples: Samples,
        report: Callable[[int, list[tuple[int, str]]], None],
        **options: Any,
    ):
        """`report` gets the step, and (number, hash) of each sample that `at` returns for it."""
        self._read = _ReadSamples(samples)
        self._report = report
        super().__init__(self._read, **options)

    def at(self, step: int) -> list[MicroBatch]:
        batches = super().at(step)
        rows = [
            _row_hash(*row)
            for batch in batches
            for row in zip(batch.inputs.numpy(), batch.targets.numpy(), strict=True)
        ]
        self._report(step, [(self._read.number_of(row), row) for row in rows])
        return batches


class _ReadSamples:
    """Samples that remember the numbers they were read by."""

    def __init__(self, samples: Samples):
        self._samples = samples
        self.seq_len = samples.seq_len
        self._numbers: dict[str, deque[int]] = defaultdict(deque)
        """Hash of a row -> the numbers it was read by and not yet handed out under: two samples
        may have the same tokens, and leave in the order in which they were read."""

    @property
    def samples_per_epoch(self) -> int:
        return self._samples.samples_per_epoch

    def batch(self, numbers: np.ndarray) -> SampleBatch:
        batch = self._samples.batch(numbers)
        for number, *row in zip(numbers.tolist(), batch.inputs, batch.targets, strict=True):
            self._numbers[_row_hash(*row)].append(number)
        return batch

    def number_of(self, row: str) -> int:
        """Return the number of a row that is handed out; -1 if no sample has these tokens."""
        numbers = self._numbers.get(row)
        return numbers.popleft() if numbers else -1


def _row_hash(inputs: np.ndarray, targets: np.ndarray) -> str:
    return hashlib.blake2b(inputs.tobytes() + targets.tobytes(), digest_size=8).hexdigest()
