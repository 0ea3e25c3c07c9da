"""Data in stages: the blend of each, data sets that go on, none of whose samples is read twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from fgpt.config.schema import DataConfig
from fgpt.data.blend import BLOCK, BlendedSamples
from fgpt.data.loader import MicroBatches
from fgpt.data.samples import StreamSamples
from fgpt.data.stages import Stage, StagedSamples, open_staged_dataset
from fgpt.data.token_dataset import TokenDataset, open_blended_dataset
from fgpt.errors import DataError
from tests.data.numbered import numbered

ONE = (Fraction(1),)


def mixed(*weights: str) -> tuple[Fraction, ...]:
    return tuple(map(Fraction, weights))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[StreamSamples]:
    """Three splits of other lengths: 1999, 2999 and 3999 samples of two tokens."""
    folder = tmp_path_factory.mktemp("stages")
    lengths = (4000, 6000, 8000)
    return [StreamSamples(numbered(folder, [n], f"{n}"), 2, seed=7) for n in lengths]


def test_single_data_sets_by_hand(datasets: list[StreamSamples]) -> None:
    """The first one goes on behind the second."""
    stages = [Stage(0, (0,), ONE), Stage(5, (1,), ONE), Stage(8, (0,), ONE), Stage(8, (2,), ONE)]
    stages.append(Stage(10, (0,), ONE))
    staged = StagedSamples(datasets, stages)
    which, inner = staged.assign(np.arange(13))
    assert which.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 0, 0, 0]
    assert inner.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 5, 6, 7]
    batch = staged.batch(np.array([10, 5, 4, 9]))
    expected = [datasets[k].batch(np.array([i])) for k, i in ((0, 5), (1, 0), (0, 4), (2, 1))]
    assert np.array_equal(batch.inputs, np.concatenate([each.inputs for each in expected]))
    assert np.array_equal(batch.targets, np.concatenate([each.targets for each in expected]))
    assert staged.samples_per_epoch == 10 + 1999 - 5
    with pytest.raises(DataError, match="sample number -1 is negative"):
        staged.assign(np.array([3, -1]))


STAGES = [
    Stage(0, (0, 1), mixed("0.7", "0.3")),
    Stage(1000, (1, 0, 2), mixed("0.2", "0.3", "0.5")),
    Stage(1700, (2,), ONE),
    Stage(1900, (2, 0), mixed("1", "3")),
]
ENDS = (1000, 1700, 1900, 2600)


def test_no_sample_is_read_twice(datasets: list[StreamSamples]) -> None:
    """And none is left out but fewer than 256 at the end of a stage."""
    staged = StagedSamples(datasets, STAGES, seed=3)
    which, inner = staged.assign(np.arange(ENDS[-1]))
    pairs = list(zip(which.tolist(), inner.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    highest: Counter[int] = Counter()
    read: defaultdict[int, int] = defaultdict(int)
    for k, i in pairs:
        highest[k], read[k] = max(highest[k], i + 1), read[k] + 1
    assert all(0 <= highest[k] - read[k] < BLOCK * len(STAGES) for k in range(3))
    for stage, end in zip(STAGES, ENDS, strict=True):
        found = Counter(which[stage.begin : end].tolist())
        assert set(found) == set(stage.members)
        for k, weight in zip(stage.members, stage.weights, strict=True):
            exact = (end - stage.begin) * weight / sum(stage.weights)
            assert abs(found[k] - exact) < 25, (stage, k)  # within its last block by chance
    # in any order, the same samples
    order = np.random.default_rng(1).permutation(ENDS[-1])
    assert np.array_equal(staged.assign(order)[0], which[order])
    assert np.array_equal(staged.assign(order)[1], inner[order])


def test_before_a_stage_it_is_the_run_without(datasets: list[StreamSamples]) -> None:
    numbers = np.arange(1000)
    for members, weights in (((0, 1), STAGES[0].weights), ((1,), ONE)):
        first = Stage(0, members, weights)
        staged = StagedSamples(datasets, [first, Stage(1000, (2,), ONE)], seed=3)
        plain = datasets[1]
        blend = BlendedSamples([datasets[0], datasets[1]], STAGES[0].weights, seed=3)
        wanted = (plain if len(members) == 1 else blend).batch(numbers)
        assert np.array_equal(staged.batch(numbers).inputs, wanted.inputs)
        # a later stage changes nothing of the earlier ones
        more = StagedSamples(datasets, [first, *STAGES[2:]], seed=3)
        assert np.array_equal(more.batch(numbers).inputs, wanted.inputs)


def test_ranks_read_the_same_steps(datasets: list[StreamSamples]) -> None:
    """Through a boundary inside of a step."""
    staged = StagedSamples(datasets, STAGES, seed=3)
    for step in (124, 212):  # samples 992-999 and 1696-1703
        rows = []
        for rank in range(2):
            with MicroBatches(staged, micro=2, accumulation=2, dp_rank=rank, dp_size=2) as loader:
                rows += [row for batch in loader.at(step) for row in batch.inputs.tolist()]
        expected = staged.batch(np.arange(8 * step, 8 * step + 8)).inputs.tolist()
        assert sorted(rows) == sorted(expected)


def test_an_opened_one(prepared: TokenDataset, copy_of: Callable[[], Path]) -> None:
    copy, path = copy_of(), str(prepared.path)
    data = open_staged_dataset(path, f"320={copy}:0.5,{path}:0.5;330.5={copy}/")
    assert [each.path for each in data.every] == [prepared.path, copy]
    name = prepared.card.fingerprint()
    assert data.fingerprint() == name
    assert data.stage_identity(32) == [[10, f"1/2 of {name}, 1/2 of {name}"], [11, name]]
    assert type(data.samples("valid", DataConfig(), 32, seed=0)) is StreamSamples
    staged = data.samples("train", DataConfig(packing="best_fit"), 32, seed=0)
    assert isinstance(staged, StagedSamples)
    assert [(stage.begin, stage.members) for stage in staged.stages] == [
        (0, (0,)),
        (10, (1, 0)),
        (11, (1,)),
    ]
    epoch = prepared.train.tokens // 32 - 1
    lines = list(data.usage(32, 11 + epoch))
    assert lines[0].endswith(f"; {10.5 / epoch:.3g} epochs")
    assert lines[1].endswith(f"; {(0.5 + epoch) / epoch:.3g} epochs: repeated")
    assert lines[2:] == [
        f"from sample 0 on: 1 {path}",
        f"from sample 10 on: 0.5 {copy}, 0.5 {path}",
        f"from sample 11 on: 1 {copy}",
    ]
    with pytest.raises(DataError, match="the model has 300 rows"):
        data.check_fits(300)
    assert open_blended_dataset(path).stage_identity(32) == []
