"""The samples of all ranks depend on the step only, however the run was interrupted."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fgpt.config.batch import BatchRamp
from fgpt.data.loader import MicroBatches
from fgpt.data.samples import SampleBatch, StreamSamples
from fgpt.data.token_dataset import TokenDataset
from fgpt.errors import DataError


@pytest.fixture(scope="module")
def samples(prepared: TokenDataset) -> StreamSamples:
    return StreamSamples(prepared.train, 64, seed=3)


def read(loader: MicroBatches, steps: Sequence[int]) -> torch.Tensor:
    """Inputs of these steps, [samples, seq_len]."""
    return torch.cat([inputs for step in steps for inputs, *_ in loader.at(step)])


def test_the_arithmetic(samples: StreamSamples) -> None:
    with MicroBatches(samples, micro=2, accumulation=3, dp_rank=1, dp_size=4) as loader:
        assert loader.global_batch == 24
        ids = loader.sample_ids(5)
        assert ids.shape == (3, 4, 2)
        for a, r, j in itertools.product(range(3), range(4), range(2)):
            assert ids[a, r, j] == 5 * 24 + (a * 4 + r) * 2 + j
        for a, (inputs, targets, begins, positions) in enumerate(loader.at(5)):
            want = samples.batch(ids[a, 1])
            assert inputs.dtype == targets.dtype == torch.int64
            assert begins is positions is None
            assert np.array_equal(inputs.numpy(), want[0])
            assert np.array_equal(targets.numpy(), want[1])


def test_a_ramp_reads_every_sample_once(samples: StreamSamples) -> None:
    """In any number of ranks, and from any origin."""
    ramp = BatchRamp(((0, 4), (2, 8), (3, 16)))
    seen = [0, 4, 8, 16, 32, 48]
    ranks = [
        MicroBatches(samples, micro=2, ramp=ramp, dp_rank=rank, dp_size=2, prefetch=2 * rank)
        for rank in range(2)
    ]
    for step in range(5):
        numbers = np.arange(seen[step], seen[step + 1])
        assert ranks[0].samples_seen(step) == seen[step]
        assert np.array_equal(ranks[0].sample_ids(step).ravel(), numbers)
        assert [len(rank.at(step)) for rank in ranks] == [len(numbers) // 4] * 2
        rows = [row for rank in ranks for row in read(rank, [step]).tolist()]
        assert sorted(rows) == sorted(samples.batch(numbers)[0].tolist())
    later = MicroBatches(samples, micro=4, ramp=ramp, prefetch=0, origin=(2, 1000))
    assert [later.samples_seen(step) for step in (2, 3, 4)] == [1000, 1008, 1024]
    ranks[1].close()


def test_one_epoch_cut_at_every_step(samples: StreamSamples) -> None:
    with MicroBatches(samples, micro=2, accumulation=2) as whole:
        steps = samples.samples_per_epoch // whole.global_batch
        expected = read(whole, range(steps))
    numbers = np.concatenate([whole.sample_ids(step).ravel() for step in range(steps)])
    assert np.array_equal(numbers, np.arange(steps * whole.global_batch))
    starts = samples.locate(numbers).starts
    assert len(set(starts.tolist())) == len(starts)
    for cut in range(steps + 1):
        with MicroBatches(samples, micro=2, accumulation=2) as before:
            parts = [read(before, range(cut))] if cut else []
        with MicroBatches(samples, micro=2, accumulation=2) as after:
            parts += [read(after, range(cut, steps))] if cut < steps else []
        assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("cuts", [(3, 9), (1, 2), (4, 11, 17), (0, 5, 6)])
def test_two_and_three_interruptions_in_one_epoch(
    samples: StreamSamples, cuts: tuple[int, ...]
) -> None:
    with MicroBatches(samples, micro=4) as whole:
        expected = read(whole, range(20))
    edges = [0, *cuts, 20]
    parts = []
    for begin, end in itertools.pairwise(edges):
        with MicroBatches(samples, micro=4) as loader:
            parts += [loader.at(step)[0][0] for step in range(begin, end)]
    assert torch.equal(torch.cat(parts), expected)


def test_interruption_between_layouts(samples: StreamSamples) -> None:
    """Two ranks until step 7, four ranks afterwards: the same samples as one rank all the way."""

    def step_set(step: int, dp_size: int, micro: int) -> list[list[int]]:
        rows: list[list[int]] = []
        for rank in range(dp_size):
            with MicroBatches(samples, micro=micro, dp_rank=rank, dp_size=dp_size) as loader:
                rows += read(loader, [step]).tolist()
        return sorted(rows)

    for step in (0, 6):
        assert step_set(step, 2, 4) == step_set(step, 1, 8)
    for step in (7, 8, 200):
        assert step_set(step, 4, 2) == step_set(step, 1, 8)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_same_samples_per_step_at_any_world_size(
    samples: StreamSamples, world: int, accumulation: int
) -> None:
    batch = 32
    micro = batch // world // accumulation
    for step in (
        0,
        3,
        samples.samples_per_epoch // batch,
    ):  # the last one crosses into the next epoch
        rows = []
        for rank in range(world):
            with MicroBatches(
                samples, micro=micro, accumulation=accumulation, dp_rank=rank, dp_size=world
            ) as loader:
                rows += read(loader, [step]).tolist()
                assert sorted(loader.sample_ids(step).ravel()) == list(
                    range(step * batch, (step + 1) * batch)
                )
        expected = samples.batch(np.arange(step * batch, (step + 1) * batch))[0]
        assert sorted(rows) == sorted(expected.tolist())


def test_prefetch_changes_nothing(samples: StreamSamples) -> None:
    order = [0, 1, 2, 7, 8, 3, 3, 4, 0]
    with (
        MicroBatches(samples, micro=3, prefetch=3) as ahead,
        MicroBatches(samples, micro=3, prefetch=0) as plain,
    ):
        assert torch.equal(read(ahead, order), read(plain, order))


def test_as_many_steps_ahead_as_asked_for() -> None:
    read: list[int] = []

    class Noted(Failing):
        def batch(self, numbers: np.ndarray) -> SampleBatch:
            read.append(int(numbers[0]) // 2)
            return super().batch(numbers % 4)

    with MicroBatches(Noted(), micro=2, prefetch=3) as loader:
        for step in (0, 1, 9, 10):  # at 9 what was read ahead is dropped
            loader.at(step)
            assert sorted(loader._pending) == [step + 1, step + 2, step + 3]
            for coming in loader._pending.values():
                coming.result()
    assert read == [*range(5), *range(9, 14)]


def test_pinned_where_asked(samples: StreamSamples, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x)
    with MicroBatches(samples, micro=2, accumulation=3, prefetch=0, pin=True) as loader:
        assert [batch.inputs.shape for batch in loader.at(0)] == [(2, 64)] * 3
    assert pinned == [(6, 64)] * 2


def test_steps_count_from_an_origin(samples: StreamSamples) -> None:
    """After a change of the global batch, the samples go on where the earlier steps ended."""
    small = MicroBatches(samples, micro=2, prefetch=0)
    large = MicroBatches(samples, micro=6, prefetch=0, origin=(3, small.samples_seen(3)))
    assert large.sample_ids(3).ravel().tolist() == list(range(6, 12))
    assert large.samples_seen(5) == 18
    expected = [small.at(step)[0].inputs for step in (3, 4, 5)]
    assert torch.equal(large.at(3)[0].inputs, torch.cat(expected))


class Failing:
    """Samples whose third step cannot be read."""

    seq_len = 4

    def batch(self, numbers: np.ndarray) -> SampleBatch:
        if numbers.max() >= 4:
            raise DataError("disk is gone")
        return SampleBatch(
            np.zeros((len(numbers), 4), np.int64), np.zeros((len(numbers), 4), np.int64), None
        )


def test_a_failed_read_ahead_is_raised_at_its_own_step() -> None:
    with MicroBatches(Failing(), micro=2) as loader:  # type: ignore[arg-type]
        loader.at(0)
        loader.at(1)
        with pytest.raises(DataError, match="disk is gone"):
            loader.at(2)


class Slow(Failing):
    """Samples that take 50 ms per step."""

    def batch(self, numbers: np.ndarray) -> SampleBatch:
        time.sleep(0.05)
        return super().batch(numbers % 4)


def test_waiting_is_measured_and_hidden() -> None:
    with MicroBatches(Slow(), micro=2, prefetch=0) as plain:  # type: ignore[arg-type]
        for step in range(4):
            plain.at(step)
    assert plain.wait_s >= 0.2
    with MicroBatches(Slow(), micro=2) as ahead:  # type: ignore[arg-type]
        for step in range(4):
            ahead.at(step)
            time.sleep(0.1)  # the training step
    assert ahead.wait_s < plain.wait_s / 2


def test_closing_ends_the_thread(samples: StreamSamples) -> None:
    def alive() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("fgpt-data")]

    loader = MicroBatches(samples, micro=1)
    loader.at(0)
    assert alive()
    loader.close()
    assert not alive()
    assert len(loader.at(1)) == 1


def test_a_data_set_removed_during_the_run(samples: StreamSamples, tmp_path: Path) -> None:
    from fgpt.data.shards import IndexedTokens
    from fgpt.prepare.shard_writer import ShardWriter

    with ShardWriter(tmp_path / "x", 100) as writer:
        writer.add(np.arange(100))
        writer.close()
    with MicroBatches(StreamSamples(IndexedTokens(tmp_path / "x"), 8), micro=1) as loader:
        loader.at(0)
        loader.at(1)
        (tmp_path / "x.bin").unlink()
        with pytest.raises(DataError, match="x.bin: cannot be read"):
            for step in range(2, 6):
                loader.at(step)
