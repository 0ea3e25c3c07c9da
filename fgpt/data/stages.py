"""Data in stages: from a number of samples on, the samples come from another blend (`data.stages`).

Samples stay numbered globally. With b_s the first sample of stage s, sample g of stage s is sample
g - b_s of its blend (see `blend`), so that stage 0 is the run without later stages. A data set goes
on where the stages before left it: none of its samples is read twice in an epoch. A stage that ends
inside of a block of a blend leaves out the block's other samples, fewer than 256.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fgpt.config.field_syntax import parse_stages
from fgpt.data.blend import BlendedSamples, read_assigned
from fgpt.data.samples import SampleBatch, Samples
from fgpt.data.token_dataset import (
    BlendedDataset,
    TokenDataset,
    check_same_tokenizer,
    open_blended_dataset,
    open_token_dataset,
    packed_samples,
)
from fgpt.errors import DataError

if TYPE_CHECKING:
    from fgpt.config.schema import DataConfig


class Stage(NamedTuple):
    """One stage of `StagedSamples`."""

    begin: int
    """Its first sample."""
    members: tuple[int, ...]
    """Its data sets, as indices."""
    weights: tuple[Fraction, ...]
    """Of each member, positive, of any sum."""


class StagedSamples:
    """The numbered samples of several data sets, blended otherwise in each stage."""

    def __init__(self, datasets: Sequence[Samples], stages: Sequence[Stage], *, seed: int = 0):
        """`stages`: the first begins at sample 0, the others do not descend."""
        self.datasets, self.stages = tuple(datasets), tuple(stages)
        self.seq_len = datasets[0].seq_len
        self._blends = [
            BlendedSamples([datasets[k] for k in stage.members], stage.weights, seed=seed)
            for stage in stages
        ]
        # samples of each data set before each stage
        self._before = np.zeros((len(stages), len(datasets)), dtype=np.int64)
        for s, (stage, following) in enumerate(zip(stages, stages[1:], strict=False)):
            self._before[s + 1] = self._before[s]
            self._before[s + 1, stage.members] += self._counts(s, following.begin - stage.begin)

    def _counts(self, s: int, n_samples: int) -> np.ndarray:
        """Samples that the first `n_samples` of stage `s` take of each member; whole blocks."""
        if len(self.stages[s].members) == 1:  # in its own order: no blocks
            return np.array([n_samples])
        return self._blends[s].counts(n_samples)

    @property
    def samples_per_epoch(self) -> int:
        """Samples before the first data set starts its second epoch, to within a few samples."""
        ends = [*(stage.begin for stage in self.stages[1:]), math.inf]
        for s, (stage, end) in enumerate(zip(self.stages, ends, strict=True)):
            left = [
                math.floor((self.datasets[k].samples_per_epoch - int(self._before[s, k])) / share)
                for k, share in zip(stage.members, self._blends[s].shares, strict=True)
            ]
            if stage.begin + min(left) < end:
                return max(stage.begin, stage.begin + min(left))
        raise AssertionError("the last stage has no end")

    def assign(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (data set, its sample number), int64 [k] each, of sample numbers int64 [k]."""
        if len(numbers) and numbers.min() < 0:
            raise DataError(f"sample number {numbers.min()} is negative")
        begins = np.array([stage.begin for stage in self.stages])
        stage_of = np.searchsorted(begins, numbers, side="right") - 1
        which, inner = np.empty_like(numbers), np.empty_like(numbers)
        for s in np.unique(stage_of).tolist():
            chosen = stage_of == s
            local = numbers[chosen] - begins[s]
            members = np.array(self.stages[s].members)
            if len(members) > 1:
                member, local = self._blends[s].assign(local)
            else:
                member = np.zeros_like(local)
            which[chosen] = members[member]
            inner[chosen] = self._before[s, members[member]] + local
        return which, inner

    def batch(self, numbers: np.ndarray) -> SampleBatch:
        return read_assigned(self.datasets, *self.assign(numbers))


@dataclass(frozen=True)
class StagedDataset(BlendedDataset):
    """The opened data sets of a run in stages; those of `BlendedDataset` are the first stage's.

    Evaluation reads the first stage's validation splits in every stage.
    """

    later: tuple[tuple[float, BlendedDataset], ...] = ()
    """(tokens of the run before it, its data) of every later stage."""

    @property
    def every(self) -> tuple[TokenDataset, ...]:
        """The data sets of all stages, each once."""
        blends = (self, *(blend for _, blend in self.later))
        return tuple({each.path: each for blend in blends for each in blend.datasets}.values())

    def check_fits(self, model_vocab_size: int) -> None:
        for dataset in self.every:
            dataset.check_fits(model_vocab_size)

    def stage_identity(self, seq_len: int) -> list[list[int | str]]:
        return [
            [_first_sample(tokens, seq_len), blend.fingerprint()] for tokens, blend in self.later
        ]

    def samples(self, split: str, options: DataConfig, seq_len: int, *, seed: int) -> Samples:
        if split != "train":
            return super().samples(split, options, seq_len, seed=seed)
        every = packed_samples(self.every, split, options, seq_len, seed=seed)
        return StagedSamples(every, self._stages(seq_len), seed=seed)

    def _stages(self, seq_len: int) -> list[Stage]:
        index = {dataset.path: k for k, dataset in enumerate(self.every)}
        return [
            Stage(
                _first_sample(tokens, seq_len),
                tuple(index[dataset.path] for dataset in blend.datasets),
                blend.weights,
            )
            for tokens, blend in ((0.0, self), *self.later)
        ]

    def usage(self, seq_len: int, n_samples: int) -> Iterator[str]:
        """Yield one line per data set, with its epochs in all stages, then one per stage."""
        stages = self._stages(seq_len)
        ends = [min(n_samples, stage.begin) for stage in stages[1:]] + [n_samples]
        taken = [Fraction(0)] * len(self.every)
        for stage, end in zip(stages, ends, strict=True):
            for k, weight in zip(stage.members, stage.weights, strict=True):
                taken[k] += max(0, end - stage.begin) * weight
        for k, dataset in enumerate(self.every):
            yield dataset.usage(seq_len, float(taken[k]))
        for stage in stages:
            parts = zip(stage.members, stage.weights, strict=True)
            shares = ", ".join(f"{float(weight):.3g} {self.every[k].path}" for k, weight in parts)
            yield f"from sample {stage.begin:,} on: {shares}"


def _first_sample(tokens: float, seq_len: int) -> int:
    return math.ceil(tokens / seq_len)


def open_staged_dataset(path: str, stages: str) -> StagedDataset:
    """Open the data sets that valid `data.path` and `data.stages` name. Raises DataError."""
    open_once = cache(open_token_dataset)

    def open_one(directory: str) -> TokenDataset:
        return open_once(os.path.normpath(directory))

    first = open_blended_dataset(path, open_one)
    later = tuple(
        (stage.tokens, open_blended_dataset(stage.path, open_one)) for stage in parse_stages(stages)
    )
    staged = StagedDataset(first.datasets, first.weights, later)
    check_same_tokenizer(staged.every)
    return staged
