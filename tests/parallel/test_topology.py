"""The grid's arithmetic against values by hand, and its process groups."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fgpt.parallel.topology import (
    GROUP_AXES,
    Grid,
    GridCoordinates,
    Mpu,
    make_process_groups,
    record_process_groups,
)
from tests.ranks import run_ranks


def test_the_tensor_axis_is_innermost():
    grid = Grid(pp=2, dp=2, cp=1, tp=2)
    assert [grid.coordinates(rank) for rank in range(4)] == [
        GridCoordinates(0, 0, 0, 0),
        GridCoordinates(0, 0, 0, 1),
        GridCoordinates(0, 1, 0, 0),
        GridCoordinates(0, 1, 0, 1),
    ]
    assert grid.coordinates(7) == GridCoordinates(1, 1, 0, 1)
    assert grid.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.groups("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grid.groups("pipe") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.groups("model") == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_replicas_are_data_and_context_ranks():
    grid = Grid(pp=1, dp=2, cp=2, tp=2)
    assert grid.groups("context") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grid.groups("replica") == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 2), (3, 2, 2, 4)])
@pytest.mark.parametrize("kind", sorted(GROUP_AXES))
def test_each_rank_is_in_one_group_of_a_kind(shape, kind):
    grid = Grid(*shape)
    assert sorted(rank for ranks in grid.groups(kind) for rank in ranks) == list(range(grid.size))
    assert all(grid.rank(grid.coordinates(rank)) == rank for rank in range(grid.size))


def test_deepspeed_agrees():
    """DeepSpeed's topology numbers the ranks in the same order."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    grid, theirs = (
        Grid(pp=2, dp=3, tp=2),
        PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3),
    )
    for rank in range(grid.size):
        coordinates, there = grid.coordinates(rank), theirs.get_coord(rank)
        assert (coordinates.pipe, coordinates.data, coordinates.tensor) == (
            there.pipe,
            there.data,
            there.model,
        )


def sums(world):
    """Sum of the ranks over each of this rank's groups, and the mpu's answers."""
    groups = make_process_groups(Grid(pp=1, dp=1, cp=2, tp=2), world.rank, timedelta(seconds=7))
    found = {}
    for kind in ("tensor", "context", "replica", "model"):
        number = torch.tensor([world.rank])
        dist.all_reduce(number, group=getattr(groups, kind))
        found[kind] = int(number)
    mpu = Mpu(groups)
    found["mpu"] = (
        mpu.get_data_parallel_rank(),
        mpu.get_data_parallel_group_ranks(),
        mpu.get_model_parallel_rank(),
    )
    found["timeout"] = groups.tensor._get_backend(torch.device("cpu")).options._timeout.seconds
    with record_process_groups(timedelta(seconds=9)) as recorded:
        theirs = dist.new_group([0, 1])
    found["recorded"] = len(recorded)
    if world.rank < 2:
        found["theirs"] = theirs._get_backend(torch.device("cpu")).options._timeout.seconds
    return found


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_groups_on_four_ranks():
    found = run_ranks(sums, 4)
    assert [f["tensor"] for f in found] == [1, 1, 5, 5]
    assert [f["context"] for f in found] == [2, 4, 2, 4]
    assert [f["replica"] for f in found] == [2, 4, 2, 4]
    assert [f["model"] for f in found] == [1, 1, 5, 5]
    assert found[3]["mpu"] == (1, [1, 3], 1)
    assert [f["recorded"] for f in found] == [1, 1, 0, 0]
    assert found[0]["timeout"] == 7 and found[0]["theirs"] == 9


def wrong_size(world):
    try:
        make_process_groups(Grid(tp=3), world.rank, timedelta(seconds=5))
    except ValueError as error:
        return str(error)


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_a_grid_of_another_size():
    assert "3 ranks, 2 are running" in run_ranks(wrong_size, 2)[0]
