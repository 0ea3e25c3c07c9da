"""The law of losses: it finds the constants that made its runs."""

from __future__ import annotations

import math
import random

import pytest

from fgpt.bench.loss_law import LossLaw, Run, fit, refits, spread
from fgpt.errors import UserError

CHINCHILLA = LossLaw(E=1.69, A=406.4, a=0.34, B=410.7, b=0.28)
"""Hoffmann et al. 2022, equation 10."""
SMALL = LossLaw(E=1.2, A=30, a=0.25, B=80, b=0.28)


def runs_of(law: LossLaw, sizes: list[float], tokens: list[float], noise: float = 0) -> list[Run]:
    draw = random.Random(1)
    return [
        Run(n, d, law.predict(n, d) * math.exp(draw.gauss(0, noise))) for n in sizes for d in tokens
    ]


def small_runs(noise: float = 0) -> list[Run]:
    """Four sizes of a laptop's ladder, at three computes each."""
    runs = []
    for n in (0.46e6, 0.8e6, 1.3e6, 2.5e6):
        runs += runs_of(SMALL, [n], [1e13 / n / share for share in (4, 2, 1)])
    draw = random.Random(1)
    return [Run(n, d, loss * math.exp(draw.gauss(0, noise))) for n, d, loss in runs]


def test_prediction_by_hand() -> None:
    law = LossLaw(E=2.0, A=10.0, a=0.5, B=100.0, b=1.0)
    assert law.predict(100, 50) == pytest.approx(2 + 1 + 2)


@pytest.mark.parametrize(
    ("law", "runs"),
    [
        (CHINCHILLA, runs_of(CHINCHILLA, [7e7, 1.6e9, 1.6e10], [5e9, 5e10, 1.4e12])),
        (SMALL, small_runs()),
    ],
)
def test_recovers_the_constants(law: LossLaw, runs: list[Run]) -> None:
    found = fit(runs)
    for name in ("E", "A", "a", "B", "b"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-4), name


def test_chinchilla_itself_is_predicted_from_smaller_runs_with_noise() -> None:
    sizes = [4.4e7, 1.6e8, 5.7e8, 2e9]
    found = fit(runs_of(CHINCHILLA, sizes, [2e9, 1e10, 5e10, 2.5e11], noise=0.002))
    assert found.a == pytest.approx(0.34, abs=0.04) and found.b == pytest.approx(0.28, abs=0.04)
    assert found.predict(7e10, 1.4e12) == pytest.approx(CHINCHILLA.predict(7e10, 1.4e12), rel=0.02)


def test_noise_and_the_refits() -> None:
    runs = small_runs(noise=0.003)
    found, others = fit(runs), refits(runs)
    assert len(others) == len(runs)
    assert found.predict(4.2e6, 2.4e6) == pytest.approx(SMALL.predict(4.2e6, 2.4e6), rel=0.01)
    ranges = spread(others)
    assert all(ranges[name][0] < ranges[name][1] for name in ranges)
    assert ranges["a"][0] <= found.a <= ranges["a"][1]


def test_a_run_that_went_wrong_hardly_moves_the_law() -> None:
    """Least squares of the logarithms would: the Huber loss is linear in it."""
    runs = small_runs()
    runs[5] = runs[5]._replace(loss=1.3 * runs[5].loss)
    assert fit(runs).predict(4.2e6, 2.4e6) == pytest.approx(SMALL.predict(4.2e6, 2.4e6), rel=0.01)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([], "0 runs do not determine them; it takes 6"),
        (small_runs()[:5], "5 runs do not"),
        (small_runs()[:3] * 3, "runs of 1 sizes do not"),
        (small_runs()[:6], "runs of 2 sizes do not"),
        (runs_of(SMALL, [1e5, 2e5, 3e5, 4e5, 5e5, 6e5], [1e6]), "1 token counts"),
        ([*small_runs(), Run(1e6, 1e6, math.nan)], "loss nan has no logarithm"),
    ],
)
def test_undetermined_is_one_line(runs: list[Run], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        fit(runs)
    assert "\n" not in str(caught.value)


def test_losses_without_a_law_end_in_numbers_or_one_line() -> None:
    """Losses that rise with size and tokens, or are all the same."""
    for loss in (lambda n, d: 4.0, lambda n, d: math.log(n * d) / 8):
        runs = [Run(n, d, loss(n, d)) for n, d, _ in small_runs()]
        try:
            assert math.isfinite(fit(runs).predict(4e6, 2e6))
        except UserError as error:
            assert "follow no law" in str(error)
