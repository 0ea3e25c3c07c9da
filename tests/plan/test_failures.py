"""Failures: the formula against a simulated run, and Young's interval against all others."""

from __future__ import annotations

import random

import pytest

from fgpt.plan.failures import goodput


def simulate(mtbf_s: float, interval_s: float, stall_s: float, restart_s: float) -> float:
    """Share of useful time of 20,000 failures at exponential distances."""
    draw, useful, wall = random.Random(1), 0.0, 0.0
    for _ in range(20_000):
        until_failure = draw.expovariate(1 / mtbf_s)
        saves = int(until_failure // (interval_s + stall_s))
        useful += saves * interval_s
        wall += until_failure + restart_s
    return useful / wall


@pytest.mark.parametrize(("gpus", "stall_s"), [(1024, 30.0), (16_384, 5.0), (16_384, 60.0)])
def test_goodput_is_that_of_a_simulated_run(gpus: int, stall_s: float) -> None:
    predicted = goodput(gpus, stall_s, restart_s=300)
    mtbf_s = 50_700 * 3600 / gpus
    measured = simulate(mtbf_s, predicted.interval_s, stall_s, 300)
    assert predicted.goodput == pytest.approx(measured, abs=0.01)
    assert predicted.failures_per_day == pytest.approx(24 * gpus / 50_700)


def test_the_best_interval() -> None:
    best = goodput(16_384, 20)
    for factor in (0.5, 0.8, 1.25, 2):
        other = goodput(16_384, 20, interval_s=best.interval_s * factor)
        assert other.goodput < best.goodput


def test_a_save_that_takes_longer_than_youngs_interval() -> None:
    assert goodput(100_000, 0.1, save_s=300).interval_s == 300
    assert goodput(100_000, 0.1, save_s=300).lost == pytest.approx(450 / (50_700 * 36 / 1000))
    assert goodput(10_000_000, 60, restart_s=3600).goodput == 0  # it never comes to a step
