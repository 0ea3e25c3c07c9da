"""The batch arithmetic, solved from any of its numbers."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fgpt.config.batch import ACCUMULATION, GLOBAL, MICRO, Batch, BatchError, BatchRamp, solve

small = st.integers(1, 40)


size = st.integers(1, 4)


@given(micro=small, accumulation=small, dp=small, tp=size, pp=size, cp=size)
def test_any_part_gives_the_whole(
    micro: int, accumulation: int, dp: int, tp: int, pp: int, cp: int
) -> None:
    world, global_size = dp * tp * pp * cp, micro * accumulation * dp
    whole = Batch(micro, accumulation, global_size, world, tp, pp, cp, dp)
    grid = {"world": world, "tp": tp, "pp": pp, "cp": cp}
    assert (
        solve(global_size=whole.global_size, micro=micro, accumulation=accumulation, **grid)
        == whole
    )
    assert solve(global_size=None, micro=micro, accumulation=accumulation, **grid) == whole
    assert (
        solve(global_size=whole.global_size, micro=None, accumulation=accumulation, **grid) == whole
    )
    assert solve(global_size=whole.global_size, micro=micro, accumulation=None, **grid) == whole


@given(micro=small, dp=small)
def test_accumulation_defaults_to_one(micro: int, dp: int) -> None:
    expected = Batch(micro, 1, micro * dp, dp, 1, 1, 1, dp)
    assert solve(global_size=None, micro=micro, accumulation=None, world=dp) == expected
    assert solve(global_size=micro * dp, micro=None, accumulation=None, world=dp) == expected


@given(
    global_size=st.none() | small,
    micro=st.none() | small,
    accumulation=st.none() | small,
    world=small,
)
def test_a_solution_holds_and_keeps_what_was_given(
    global_size: int | None, micro: int | None, accumulation: int | None, world: int
) -> None:
    assume(global_size is not None or micro is not None)
    try:
        batch = solve(global_size=global_size, micro=micro, accumulation=accumulation, world=world)
    except BatchError as error:
        if global_size is not None:
            assert str(global_size) in error.what and f"dp {world}" in error.what
        return
    assert batch.global_size == batch.micro * batch.accumulation * batch.dp
    assert global_size in (None, batch.global_size)
    assert micro in (None, batch.micro)
    assert accumulation in (None, batch.accumulation)


def test_a_contradiction_names_the_numbers() -> None:
    with pytest.raises(BatchError) as caught:
        solve(global_size=30, micro=4, accumulation=2, world=8, tp=2)
    assert caught.value.what == (
        "train_batch_size 30 is not train_micro_batch_size_per_gpu 4 x"
        " gradient_accumulation_steps 2 x dp 4 = 32"
        " (world 8 = tp 2 x pp 1 x dp 4; global = micro x accumulation x dp)"
    )


@pytest.mark.parametrize(
    ("global_size", "micro", "accumulation", "dp", "expected"),
    [
        (64, 4, 2, 4, "gradient_accumulation_steps 4; or train_micro_batch_size_per_gpu 8"),
        (30, 4, None, 4, "nearest: train_batch_size 32; or train_batch_size 16"),
        (30, 4, 1, 4, "nearest: train_batch_size 16"),
        (28, 4, 1, 4, "train_micro_batch_size_per_gpu 7"),
        (28, 4, 2, 4, "train_micro_batch_size_per_gpu 1 with gradient_accumulation_steps 7"),
        (3, 4, 1, 4, "train_batch_size 16"),
        (32, 2, 8, 8, "; or start 2 processes"),
        (16, 16, None, 8, "nearest: train_micro_batch_size_per_gpu 2; or train_batch_size 128; or"),
        (650, None, 1, 8, "or start 1, 2, 5, 10, 13, 25, 26, 50, 65, 130, 325 or 650 processes"),
    ],
)
def test_nearest_legal_choices(
    global_size: int, micro: int | None, accumulation: int | None, dp: int, expected: str
) -> None:
    with pytest.raises(BatchError) as caught:
        solve(global_size=global_size, micro=micro, accumulation=accumulation, world=dp)
    assert expected in caught.value.fix


@given(global_size=small, micro=st.none() | small, accumulation=st.none() | small, world=small)
def test_the_first_remedy_and_the_worlds_hold(
    global_size: int, micro: int | None, accumulation: int | None, world: int
) -> None:
    written = {GLOBAL: global_size, MICRO: micro, ACCUMULATION: accumulation}
    try:
        solve(global_size=global_size, micro=micro, accumulation=accumulation, world=world)
    except BatchError as error:
        g, m, a = (written | error.nearest).values()
        solve(global_size=g, micro=m, accumulation=a, world=world)
        worlds = error.fix.partition("or start ")[2].removesuffix(" processes")
        for number in re.findall(r"\d+", worlds):
            sizes = {"global_size": global_size, "micro": micro, "accumulation": accumulation}
            solve(**sizes, world=int(number))


def test_explain() -> None:
    batch = solve(global_size=None, micro=4, accumulation=2, world=8, tp=2)
    assert batch.explain() == (
        "world 8 = tp 2 x pp 1 x dp 4; global batch 32 = micro 4 x accumulation 2 x dp 4"
    )


def test_context_parallel_ranks_share_their_samples() -> None:
    batch = solve(global_size=None, micro=4, accumulation=2, world=8, cp=2)
    assert batch.explain() == (
        "world 8 = tp 1 x pp 1 x cp 2 x dp 4; global batch 32 = micro 4 x accumulation 2 x dp 4"
    )


RAMP = BatchRamp(((0, 4), (2, 8), (4, 16)))


def test_a_ramp_by_hand() -> None:
    assert [RAMP.size_at(step) for step in range(7)] == [4, 4, 8, 8, 16, 16, 16]
    assert [RAMP.samples_before(step) for step in range(7)] == [0, 4, 8, 16, 24, 40, 56]
    steps = {1: 1, 4: 1, 5: 2, 8: 2, 9: 3, 16: 3, 24: 4, 25: 5, 40: 5, 41: 6, 56: 6}
    assert {samples: RAMP.steps_for(samples) for samples in steps} == steps
    assert RAMP.explain() == "4 from step 0, 8 from step 2, 16 from step 4"
    constant = BatchRamp(((0, 8),))
    assert (constant.samples_before(5), constant.steps_for(17)) == (40, 3)
