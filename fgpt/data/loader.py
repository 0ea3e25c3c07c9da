"""What one data rank reads: micro-batches of a step, loaded some steps ahead.

    g = step * global + (a * dp_size + dp_rank) * micro + j
        global = micro * accumulation * dp_size; a: accumulation index; j: row of the micro-batch

So a step reads the samples [step * global, (step + 1) * global) whatever the layout, and the data
position of a run is one integer: samples seen = step * global. Resuming is asking for another step.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgpt.data.samples.blend import Samples
from fgpt.errors import DataError


class MicroBatch(NamedTuple):
    """Samples that go through the model together; whole rows on every rank."""

    inputs: Tensor
    """int64 [micro, seq_len]."""
    targets: Tensor
    """int64 [micro, seq_len]."""
    begins: Tensor | None = None
    """Column at which each token's document begins in its row, int64 [micro, seq_len]: tokens
    attend to those from there on only. None: to the whole row before them."""
    positions: Tensor | None = None
    """Each token's position, int64 [micro, seq_len]; None: its column."""


class MicroBatches:
    """The micro-batches of data rank `dp_rank` of `dp_size`, a pure function of the step."""

    def __init__(
        self,
        samples: Samples,
        *,
        micro: int,
        accumulation: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        prefetch: int = 2,
        reset_positions: bool = False,
        pin: bool = False,
    ):
        """`micro`: samples per micro-batch; `accumulation`: micro-batches per step and rank.

        `prefetch`: steps that a thread reads ahead while others train; 0: no thread.
        `reset_positions`: positions count from where `samples` say that documents begin.
        `pin`: into page-locked memory, from which copies to a GPU need not be waited for.
        """
        self._samples = samples
        self._prefetch = prefetch
        self._reset_positions, self._pin = reset_positions, pin
        self._shape = (accumulation, dp_size, micro)
        self._dp_rank = dp_rank
        self.global_batch = accumulation * dp_size * micro
        """Samples per step, over all ranks."""
        self.wait_s = 0.0
        """Time spent in `at` so far, in seconds: what data costs the training loop."""
        self._pool = ThreadPoolExecutor(1, "fgpt-data") if prefetch else None
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Samples before any token is read a second time."""
        return self._samples.samples_per_epoch

    def sample_ids(self, step: int) -> np.ndarray:
        """Sample numbers of `step` on all ranks, int64 [accumulation, dp_size, micro]."""
        first = step * self.global_batch
        return np.arange(first, first + self.global_batch).reshape(self._shape)

    def at(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of `step`, in order of accumulation. Raises DataError."""
        t0 = time.perf_counter()
        coming = self._ahead.pop(step, None)
        batches = self._load(step) if coming is None else coming.result()
        if self._pool:
            self._read_ahead(self._pool, range(step + 1, step + 1 + self._prefetch))
        self.wait_s += time.perf_counter() - t0
        return batches

    def _read_ahead(self, pool: ThreadPoolExecutor, steps: range) -> None:
        """Have these steps read and no others; what one raises is raised when it is asked for."""
        for step in self._ahead.keys() - steps:
            self._ahead.pop(step).cancel()
        for step in steps:
            if step not in self._ahead:
                self._ahead[step] = pool.submit(self._load, step)

    def step_at(self, samples_seen: int) -> int:
        """The step that begins at data position `samples_seen`.

        Raises DataError between two steps, which happens if the global batch was changed.
        """
        step, rest = divmod(samples_seen, self.global_batch)
        if rest:
            what = f"{samples_seen} samples seen are not whole steps of {self.global_batch} samples"
            raise DataError(f"data position: {what}; resume with the global batch of that run")
        return step

    def close(self) -> None:
        """Stop the thread; `at` still works afterwards, without reading ahead."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._ahead = None, {}

    def _load(self, step: int) -> list[MicroBatch]:
        mine = self.sample_ids(step)[:, self._dp_rank]  # [accumulation, micro]
        rows = self._samples.batch(mine.reshape(-1))
        positions = None
        if self._reset_positions and rows.begins is not None:
            positions = np.arange(self._samples.seq_len) - rows.begins
        parts = [self._per_micro(part, len(mine)) for part in (*rows, positions)]
        return [MicroBatch(*four) for four in zip(*parts, strict=True)]

    def _per_micro(self, rows: np.ndarray | None, accumulation: int) -> list[Any]:
        """int64 [accumulation * micro, seq_len] -> [micro, seq_len] for each micro-batch."""
        if rows is None:
            return [None] * accumulation
        whole = torch.from_numpy(rows)
        return list((whole.pin_memory() if self._pin else whole).chunk(accumulation))

    def __enter__(self) -> MicroBatches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
