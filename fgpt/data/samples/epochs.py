"""Sample number -> tokens: a pure function of (seed, number), with no state and no index to build.

The split is one stream of T tokens. A sample is a window of seq_len + 1 of them: its first seq_len
are the inputs, its last seq_len the targets. Samples are numbered globally, through all epochs:

    (epoch, i) = divmod(g, n)              n = samples per epoch, the same for every epoch
    window g   = [start, start + seq_len + 1)

    start = phase(seed, epoch) + seq_len * permute(seed, epoch)(i)
            0 <= phase < seq_len, so that each epoch cuts the stream elsewhere
    n     = T // seq_len - 1

Evaluation reads the first samples of epoch 0 of the validation split: a fixed draw from all of it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fgpt.data.permutation import derive, permute
from fgpt.data.shards import IndexedTokens
from fgpt.errors import DataError

_ORDER, _PHASE = 0, 1


@lru_cache(maxsize=8)
def _order_key(seed: int, epoch: int) -> np.ndarray:
    return derive(_ORDER, seed, epoch)


@lru_cache(maxsize=8)
def _phase(seed: int, epoch: int, seq_len: int) -> int:
    return int(derive(_PHASE, seed, epoch)[0]) % seq_len


class Samples:
    """The numbered samples of one split."""

    def __init__(self, tokens: IndexedTokens, seq_len: int, *, seed: int = 0):
        """Raises DataError if the split is too short for one sample of `seq_len` tokens."""
        self.tokens = tokens
        self.seq_len = seq_len
        """Tokens per sample."""
        self._seed = seed
        total = tokens.tokens
        self.per_epoch = total // seq_len - 1
        """Samples per epoch (n above)."""
        if self.per_epoch < 1:
            what = f"a split of {total} tokens; seq_len {seq_len} needs at least {2 * seq_len}"
            raise DataError(f"{tokens.path}: {what}; use more text or a smaller seq_len")

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """First token of each sample, int64 [k], for sample numbers int64 [k], all >= 0."""
        if len(numbers) and numbers.min() < 0:
            raise DataError(f"sample number {numbers.min()} is negative")
        epochs, places = np.divmod(numbers, self.per_epoch)
        out = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            order = permute(_order_key(self._seed, epoch), self.per_epoch, places[here])
            out[here] = _phase(self._seed, epoch, self.seq_len) + order * self.seq_len
        return out

    def batch(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets), each int64 [k, seq_len], of sample numbers int64 [k]."""
        window = self.tokens.windows(self.starts(numbers), self.seq_len + 1)  # [k, seq_len + 1]
        return window[:, :-1], window[:, 1:]

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets), each int64 [seq_len], of one sample."""
        inputs, targets = self.batch(np.array([number]))
        return inputs[0], targets[0]
