"""Every kind of samples: a run reads the same after any interruption and on any number of ranks."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from fgpt.data import best_fit
from fgpt.data.best_fit import BestFitSamples
from fgpt.data.blend import BlendedSamples
from fgpt.data.loader import MicroBatch, MicroBatches
from fgpt.data.samples import Samples, StreamSamples
from fgpt.data.shards import IndexedTokens
from tests.data.numbered import numbered, random_lengths

SEQ_LEN = 16
KINDS = ["stream", "stream mask", "best_fit", "best_fit mask", "blend", "blend best_fit mask"]


class Source:
    """Two small splits, and samples from them without cached state."""

    def __init__(self, folder: Path):
        self.folder = folder
        for k, count in enumerate((150, 70)):
            numbered(folder, random_lengths(k, count, 11), str(k))

    def samples(self, kind: str) -> Samples:
        how = BestFitSamples if "best_fit" in kind else StreamSamples
        tokens = [IndexedTokens(self.folder / str(k)) for k in range(2)]
        parts = [how(t, SEQ_LEN, seed=9, mark_documents="mask" in kind) for t in tokens]
        if "blend" not in kind:
            return parts[0]
        return BlendedSamples(parts, [Fraction(7, 10), Fraction(3, 10)], seed=9)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("splits"))


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 16 samples, pools of 2, so that an epoch has several."""
    monkeypatch.setattr(best_fit, "GROUP_SAMPLES", 16)
    monkeypatch.setattr(best_fit, "POOL_GROUPS", 2)


def joined(batches: list[MicroBatch]) -> list[list[list[int]]]:
    """Everything of every sample, one list for each sample."""
    parts = [torch.stack([x for x in batch if x is not None], dim=1) for batch in batches]
    return torch.cat(parts).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_after_every_sample_of_an_epoch(source: Source, kind: str) -> None:
    reset = "mask" in kind

    def read(first: int, end: int) -> list[list[list[int]]]:
        """Samples [first, end) of a process that resumes at step `first`, of one sample."""
        samples = source.samples(kind)
        with MicroBatches(samples, micro=1, prefetch=0, reset_positions=reset) as loader:
            return joined([batch for step in range(first, end) for batch in loader.at(step)])

    n = source.samples(kind).samples_per_epoch + 5  # into the next epoch
    assert n > 60
    expected = read(0, n)
    if "blend" not in kind:  # whose two splits have tokens in common
        assert len({tuple(row[0]) for row in expected}) >= n - 5
    for cut in range(1, n):
        assert expected[cut:] == read(cut, n)  # those before are the uninterrupted run's


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_same_samples_per_step_at_any_world_size(source: Source, kind: str, world: int) -> None:
    batch = 16
    whole = source.samples(kind)
    for step in (
        0,
        3,
        whole.samples_per_epoch // batch,
    ):  # the last one crosses into the next epoch
        rows = []
        for rank in range(world):
            samples = source.samples(kind)
            with MicroBatches(
                samples, micro=batch // world // 2, accumulation=2, dp_rank=rank, dp_size=world
            ) as loader:
                rows += [x.tolist() for part in loader.at(step) for x in part.inputs]
        expected = whole.batch(np.arange(step * batch, (step + 1) * batch)).inputs
        assert sorted(rows) == sorted(expected.tolist())


def test_what_a_micro_batch_says_of_documents(source: Source) -> None:
    samples = source.samples("best_fit mask")
    column = torch.arange(SEQ_LEN)
    with MicroBatches(samples, micro=4, accumulation=3, reset_positions=True) as loader:
        for batch in loader.at(2):
            assert batch.document_begins is not None and batch.positions is not None
            assert batch.document_begins.shape == batch.positions.shape == (4, SEQ_LEN)
            assert torch.equal(batch.positions, column - batch.document_begins)
            follows = batch.inputs[:, 1:] == batch.inputs[:, :-1] + 1
            assert ((batch.positions[:, 1:] == 0) | follows).all()
    with MicroBatches(samples, micro=4, reset_positions=False) as loader:
        assert all(batch.positions is None for batch in loader.at(0))
