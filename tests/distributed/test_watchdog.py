"""Which rank stalls a run, judged from what the ranks publish."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fgpt.distributed.progress import DATA, STEP
from fgpt.distributed.watchdog import RankState, find_stalled

FINE = RankState(0, "a", 1, 40, STEP, 9, 1.0, 60.0, "zero.py:7 step", True)


def ranks(**of_rank_1: object) -> list[RankState]:
    """Three ranks; rank 1 differs from the others."""
    states = [replace(FINE, rank=rank, host="ab"[rank // 2]) for rank in range(3)]
    states[1] = replace(states[1], **of_rank_1)
    return states


def test_nothing_stalls() -> None:
    assert find_stalled(ranks(), [0.5, 0.5, 0.5]) is None
    assert find_stalled(ranks(age_s=59.0), [0.5, 0.5, 0.5]) is None
    # silent, but not for longer than its phase may take
    assert find_stalled(ranks(), [0.5, 50.0, 0.5]) is None


def test_no_limit_and_a_rank_that_has_left() -> None:
    assert find_stalled(ranks(age_s=1e6, limit_s=None), [0.0] * 3) is None
    assert find_stalled(ranks(age_s=1e6, left=True), [0.0, 1e6, 0.0]) is None


def test_who_is_behind() -> None:
    states = ranks(ticks=39, phase=DATA, place="loader.py:80 at", waits=False)
    states = [replace(state, age_s=61.0) for state in states]
    assert find_stalled(states, [0.2] * 3) == (
        "no progress for 61 s: rank 1 on a stuck in step 10, reading data (at loader.py:80 at)"
    )


def test_who_waits_for_nobody_among_equals() -> None:
    states = [replace(state, age_s=61.0) for state in ranks(place="gpt.py:9 forward", waits=False)]
    said = find_stalled(states, [0.5] * 3)
    assert said is not None
    assert "rank 1 on a stuck in step 10, training step (at gpt.py:9 forward)" in said


def test_all_wait_for_each_other() -> None:
    states = [replace(state, age_s=61.0) for state in ranks()]
    said = find_stalled(states, [0.5] * 3)
    assert said is not None and "no progress for 62 s: all 3 ranks alike, stuck in step 10" in said


@pytest.mark.parametrize("behind", [0, 1, 2])
def test_who_publishes_nothing(behind: int) -> None:
    """The others have waited for longer than it: it stopped within a step of theirs."""
    states = [replace(state, age_s=61.0) for state in ranks()]
    states[behind] = replace(states[behind], age_s=2.0)
    silent = [0.5] * 3
    silent[behind] = 60.0
    said = find_stalled(states, silent)
    assert said is not None
    assert said.startswith(f"rank {behind} on {states[behind].host} sent no sign of life for 60 s")
    assert said.endswith("last word in step 10, training step")
