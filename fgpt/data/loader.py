"""The micro-batches of one data-parallel rank, read ahead by a thread.

    number = first(step) + (a * dp_size + dp_rank) * micro + j
        first(step): the samples of the steps before, step * global_batch without a ramp
        a: accumulation index, 0 to global_batch / (micro * dp_size) - 1; j: row of the micro-batch

A step reads the samples [first(step), first(step) + global_batch) in every layout, and the data
position of a run is one integer, the number of the next sample. A run resumes by requesting another
step; after a change of the global batch or the data, steps count from an origin. Samples that are
left out (`data.skip_samples`) move the later ones forward.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgpt.config.batch import BatchRamp
from fgpt.data.samples import Samples

if TYPE_CHECKING:
    from fgpt.data.skip import SkippedSamples


class MicroBatch(NamedTuple):
    """Samples that pass through the model together; full rows on every rank."""

    inputs: Tensor  # int64 [micro, seq_len]
    targets: Tensor  # int64 [micro, seq_len]
    document_begins: Tensor | None = None
    """Column at which each token's document begins, int64 [micro, seq_len]: attention is restricted
    to the document. None: attention covers all preceding tokens of the row."""
    positions: Tensor | None = None
    """Position of each token, int64 [micro, seq_len]; None: its column."""


class MicroBatches:
    """The micro-batches of data rank `dp_rank` of `dp_size`, a pure function of the step."""

    def __init__(
        self,
        samples: Samples,
        *,
        micro: int,
        accumulation: int = 1,
        ramp: BatchRamp | None = None,
        dp_rank: int = 0,
        dp_size: int = 1,
        prefetch: int = 2,
        reset_positions: bool = False,
        pin: bool = False,
        origin: tuple[int, int] = (0, 0),
        skipped: SkippedSamples | None = None,
    ):
        """`micro`: samples per micro-batch; `accumulation`: micro-batches per step and rank.
        `ramp`: samples of each step, multiples of micro * dp_size; None: all as by `accumulation`.

        `prefetch`: steps that a thread reads ahead; 0: no thread. `reset_positions`: count
        positions from the beginning of each document, where `samples` mark documents. `pin`: put
        batches in page-locked memory, for asynchronous copies to a GPU. `origin`: a step and the
        number of the sample that it begins with or, if that is skipped, after. `skipped`: samples
        that no step reads.
        """
        self._samples = samples
        self._prefetch = prefetch
        self._reset_positions, self._pin = reset_positions, pin
        self._micro, self._dp_size = micro, dp_size
        self._dp_rank = dp_rank
        self._origin, self._skipped = origin, skipped
        self.global_batch = accumulation * dp_size * micro
        """Samples per step, over all ranks; at the end of the ramp, if there is one."""
        self._ramp = ramp or BatchRamp(((0, self.global_batch),))
        self.wait_s = 0.0
        """Total time in `at`, in seconds: the training loop's wait for data."""
        self._thread = ThreadPoolExecutor(1, "fgpt-data") if prefetch else None
        self._pending: dict[int, Future[list[MicroBatch]]] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Samples before any token is read a second time."""
        return self._samples.samples_per_epoch

    def size_at(self, step: int) -> int:
        """Return the number of samples of `step`, of all ranks."""
        return self._ramp.size_at(step)

    def sample_ids(self, step: int) -> np.ndarray:
        """Return the sample numbers of `step`, int64 [accumulation, dp_size, micro]."""
        numbers = self.samples_read(step) + np.arange(self._ramp.size_at(step))
        if self._skipped is None:
            numbers += self._origin[1]
        else:
            numbers = self._skipped.numbers(self._origin[1], numbers)
        return numbers.reshape(-1, self._dp_size, self._micro)

    def at(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of `step`, one per accumulation. Raises DataError."""
        t0 = time.perf_counter()
        pending = self._pending.pop(step, None)
        batches = self._load(step) if pending is None else pending.result()
        if self._thread:
            self._read_ahead(self._thread, range(step + 1, step + 1 + self._prefetch))
        self.wait_s += time.perf_counter() - t0
        return batches

    def _read_ahead(self, thread: ThreadPoolExecutor, steps: range) -> None:
        """Submit these steps and cancel all others; `at` raises the errors of its step."""
        for step in self._pending.keys() - steps:
            self._pending.pop(step).cancel()
        for step in steps:
            if step not in self._pending:
                self._pending[step] = thread.submit(self._load, step)

    def samples_seen(self, step: int) -> int:
        """Return the data position after `step` steps: the number after the last one read."""
        n, from_sample = self.samples_read(step), self._origin[1]
        return from_sample + n if self._skipped is None else self._skipped.end(from_sample, n)

    def samples_read(self, step: int) -> int:
        """Return how many samples the steps from the origin to `step` have read."""
        before = self._ramp.samples_before
        return before(step) - before(self._origin[0])

    def close(self) -> None:
        """Stop the thread; `at` still works, without reading ahead."""
        if self._thread:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread, self._pending = None, {}

    def _load(self, step: int) -> list[MicroBatch]:
        numbers = self.sample_ids(step)[:, self._dp_rank]  # [accumulation, micro]
        batch = self._samples.batch(numbers.reshape(-1))
        positions = None
        if self._reset_positions and batch.document_begins is not None:
            positions = np.arange(self._samples.seq_len) - batch.document_begins
        fields = [self._per_micro(field, len(numbers)) for field in (*batch, positions)]
        return [MicroBatch(*values) for values in zip(*fields, strict=True)]

    def _per_micro(self, values: np.ndarray | None, accumulation: int) -> list[Any]:
        """int64 [accumulation * micro, seq_len] -> [micro, seq_len] for each micro-batch."""
        if values is None:
            return [None] * accumulation
        tensor = torch.from_numpy(values)
        return list((tensor.pin_memory() if self._pin else tensor).chunk(accumulation))

    def __enter__(self) -> MicroBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
