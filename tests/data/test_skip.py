"""Samples that are left out, against the list of those that are not."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fgpt.config.batch import BatchRamp
from fgpt.config.field_syntax import joined_ranges, parse_ranges
from fgpt.data.loader import MicroBatches
from fgpt.data.skip import SkippedSamples

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=6).map(
    lambda pairs: joined_ranges((first, first + length) for first, length in pairs)
)


def kept(ranges: Any) -> list[int]:
    """The first numbers that no range has."""
    return [g for g in range(300) if not any(first <= g <= last for first, last in ranges)]


@given(RANGES, st.integers(0, 80), st.integers(0, 40))
def test_the_next_samples_take_their_place(ranges: Any, first: int, n: int) -> None:
    expected = [g for g in kept(ranges) if g >= first][:n]
    skipped = SkippedSamples(ranges)
    assert skipped.numbers(first, np.arange(n)).tolist() == expected
    assert skipped.end(first, n) == (expected[-1] + 1 if expected else first)


@given(RANGES, st.integers(0, 9), st.integers(1, 9))
def test_a_resume_reads_on(ranges: Any, step: int, later: int) -> None:
    """From the position of any step, also where the skipped samples behind it are forgotten."""
    whole = batches(skipped=SkippedSamples(ranges))
    position = whole.samples_seen(step)
    ahead = [(first, last) for first, last in ranges if last >= position]
    for remembered in (ranges, ahead):
        resumed = batches(skipped=SkippedSamples(remembered), origin=(step, position))
        for at in (step, step + later):
            assert resumed.sample_ids(at).tolist() == whole.sample_ids(at).tolist()
            assert resumed.samples_seen(at) == whole.samples_seen(at)


def test_every_layout_reads_the_same_samples_in_the_same_step() -> None:
    skipped = SkippedSamples(parse_ranges("3-3,10-30,41-41"))
    ramp = BatchRamp(((0, 4), (2, 8)))
    numbers = [g for g in range(200) if g not in (3, 41) and not 10 <= g <= 30]
    for step in range(6):
        begin, end = ramp.samples_before(step), ramp.samples_before(step + 1)
        for micro, dp_size in ((4, 1), (2, 2), (1, 4)):
            ids = batches(skipped=skipped, ramp=ramp, micro=micro, dp_size=dp_size).sample_ids(step)
            assert ids.ravel().tolist() == numbers[begin:end]


def test_numbers_of_any_size() -> None:
    last = 10**18 - 1
    skipped = SkippedSamples(parse_ranges(f"0-0,2-{last}"))
    assert skipped.numbers(0, np.arange(3)).tolist() == [1, last + 1, last + 2]
    assert SkippedSamples([]).numbers(5, np.arange(2)).tolist() == [5, 6]


def test_ranges_are_joined_where_they_touch() -> None:
    assert parse_ranges("7-9, 0-1,3-6,12 - 12,8-10") == [(0, 1), (3, 10), (12, 12)]


def batches(**options: Any) -> MicroBatches:
    return MicroBatches(
        SimpleNamespace(seq_len=8),  # type: ignore[arg-type]
        **{"micro": 2, "accumulation": 2, "prefetch": 0} | options,
    )


def test_the_default_leaves_nothing_out() -> None:
    ids = [batches().sample_ids(step).ravel().tolist() for step in range(3)]
    assert list(itertools.chain(*ids)) == list(range(12))
