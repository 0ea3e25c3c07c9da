"""Agreements between ranks: the same result or the same error on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fgpt.distributed.agreements import (
    any_rank,
    gather_json,
    max_over_ranks,
    mean_over_ranks,
    run_on_all,
    run_on_rank0,
)
from fgpt.distributed.launch import World
from fgpt.errors import CheckpointError, FgptError, TrainingError
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
CPU = torch.device("cpu")


def test_agreements() -> None:
    for answers in run_ranks(_agree, 3):
        assert answers == {
            "gather": [{"rank": 0}, {"rank": 1}, "x" * 2000],
            "empty": [[], [], []],
            "none": [None, None, None],
            "mean": 1.0,
            "max": 2,
            "any": [False, True, True],
            "leader": {"from": 0},
        }


def _agree(world: World) -> dict[str, Any]:
    rank = world.rank
    return {
        "gather": gather_json({"rank": rank} if rank < 2 else "x" * 2000, CPU),
        "empty": gather_json([], CPU),
        "none": gather_json(None, CPU),
        "mean": float(mean_over_ranks(torch.tensor(float(rank)))),
        "max": max_over_ranks(rank, CPU),
        "any": [any_rank(flag, CPU) for flag in (False, rank == 1, True)],
        "leader": run_on_rank0(lambda: {"from": rank}, CPU),
    }


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1), (1, 2)])
def test_one_failure_is_everybodys(failing: tuple[int, ...]) -> None:
    results = run_ranks(_fail_on, 3, failing)
    first = failing[0]
    prefix = "" if first == 0 else f"rank {first}: "
    for rank, (user, system) in enumerate(results):
        own = rank == first  # its own message has no rank number
        assert user == (2, f"{'' if own else prefix}bad {first}")
        assert system[0] == 1 and "No space left on device: shard" in system[1]


def _fail_on(world: World, failing: tuple[int, ...]) -> list[tuple[int, str]]:
    def user() -> None:
        if world.rank in failing:
            raise CheckpointError(f"bad {world.rank}")

    def system() -> None:
        if world.rank in failing:
            raise OSError(28, "No space left on device", "shard")

    said = []
    for action in (user, system):
        try:
            run_on_all(action, CPU)
        except FgptError as error:
            said.append((error.exit_code, str(error)))
    return said


def test_only_the_leader_acts_and_all_hear_of_its_failure() -> None:
    for text in run_ranks(_leader_fails, 2):
        assert text == "it failed"


def _leader_fails(world: World) -> str:
    def action() -> None:
        assert world.is_rank0
        raise TrainingError("it failed")

    try:
        run_on_rank0(action, CPU)
    except TrainingError as error:
        return str(error)
    return "it worked"
