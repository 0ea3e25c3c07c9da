"""What one data rank reads: micro-batches of a step, loaded one step ahead.

    g = step * global + (a * dp_size + dp_rank) * micro + j
        global = micro * accumulation * dp_size; a: accumulation index; j: row of the micro-batch

So a step reads the samples [step * global, (step + 1) * global) whatever the layout, and the data
position of a run is one integer: samples seen = step * global. Resuming is asking for another step.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch

from fgpt.data.samples import Samples
from fgpt.errors import DataError

Micro = tuple[torch.Tensor, torch.Tensor]
"""(inputs, targets), each int64 [micro, seq_len]."""


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
        prefetch: bool = True,
    ):
        """`micro`: samples per micro-batch; `accumulation`: micro-batches per step and rank.

        `prefetch` loads step s + 1 in a thread while step s trains.
        """
        self._samples = samples
        self._shape = (accumulation, dp_size, micro)
        self._dp_rank = dp_rank
        self.global_batch = accumulation * dp_size * micro
        """Samples per step, over all ranks."""
        self.wait_s = 0.0
        """Time spent in `at` so far, in seconds: what data costs the training loop."""
        self._pool = ThreadPoolExecutor(1, "fgpt-data") if prefetch else None
        self._ahead: tuple[int, Future[list[Micro]]] | None = None

    @property
    def per_epoch(self) -> int:
        """Samples per epoch."""
        return self._samples.per_epoch

    def sample_ids(self, step: int) -> np.ndarray:
        """Sample numbers of `step` on all ranks, int64 [accumulation, dp_size, micro]."""
        first = step * self.global_batch
        return np.arange(first, first + self.global_batch).reshape(self._shape)

    def at(self, step: int) -> list[Micro]:
        """This rank's micro-batches of `step`, in order of accumulation. Raises DataError."""
        t0 = time.perf_counter()
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == step:
            batches = ahead[1].result()
        else:
            batches = self._load(step)
        if self._pool:
            self._ahead = (step + 1, self._pool.submit(self._load, step + 1))
        self.wait_s += time.perf_counter() - t0
        return batches

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
        self._pool, self._ahead = None, None

    def _load(self, step: int) -> list[Micro]:
        mine = self.sample_ids(step)[:, self._dp_rank]  # [accumulation, micro]
        inputs, targets = self._samples.batch(mine.reshape(-1))
        shape = (*mine.shape, self._samples.seq_len)
        pairs = zip(inputs.reshape(shape), targets.reshape(shape), strict=True)
        return [(torch.from_numpy(x.copy()), torch.from_numpy(y.copy())) for x, y in pairs]

    def __enter__(self) -> MicroBatches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
