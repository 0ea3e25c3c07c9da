"""Whether the best learning rate of a narrow model is that of wider ones, with muP and without.

Every model is trained with each rate of a grid, a factor of 2 apart, on the same samples in the
same order, with the recipe's whole schedule. Where the best rate is the grid's lowest or highest,
the grid of this model is extended.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fgpt.bench.recipe import Common, Recipe, TrainingRun, step_seconds
from fgpt.bench.width import WidthModel
from fgpt.errors import TrainingError, UserError
from fgpt.optim.optimizers import peak_rate

POWERS = (-1, 4)
MOST_EXTRA = 2
"""Rates by which the grid of one model is extended."""
EVALUATION_STEPS = 3
"""What the evaluation at the end of a run costs, in steps."""
SHARE_OF_TRAINING = 0.9
"""Of the time; the rest builds engines."""
RATE_KEYS = (
    "optimizer.params.lr",
    "optimizer.params.muon_lr",
    "optimizer.params.adam_lr",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.lr_range_test_min_lr",
)
"""The learning rates of a DeepSpeed JSON that the plain engine reads."""
PEAKS = ("scheduler.params.warmup_max_lr", "scheduler.params.lr_range_test_min_lr")
"""Those from which a schedule computes all rates: the optimizer's then are their proportions."""


@dataclass
class RateCurve:
    """The losses of one model by learning rate."""

    d_model: int
    mup: bool
    """See `WidthModel`."""
    losses: dict[int, float] = field(default_factory=dict)
    """Power of 2 by which the recipe's rates are multiplied -> validation loss after the last step,
    mean over the seeds; inf if one diverged."""

    @property
    def best(self) -> int:
        """The power with the lowest loss."""
        return min(self.losses, key=lambda power: self.losses[power])

    @property
    def beyond(self) -> int | None:
        """The next power beyond the grid if the best is at its end; None: it is not."""
        best = self.best
        if not math.isfinite(self.losses[best]):
            return None
        if best == min(self.losses):
            return best - 1
        return best + 1 if best == max(self.losses) else None

    @property
    def vertex(self) -> float | None:
        """The power at which the parabola through the best loss and its neighbours is lowest; None
        without two of them.
        """
        best = self.best
        low, middle, high = (self.losses.get(best + i, math.inf) for i in (-1, 0, 1))
        if not math.isfinite(low + high) or low + high == 2 * middle:
            return None
        return best + (low - high) / (2 * (low - 2 * middle + high))


def rates_of(recipe: Recipe, common: Common) -> dict[str, float]:
    """Key -> rate, of the recipe's JSON."""
    tree = common.resolved(recipe, steps=1, seed=1).deepspeed
    found = {}
    for path in RATE_KEYS:
        section, _, name = path.split(".")
        value = tree.get(section, {}).get("params", {}).get(name)
        if value is not None:
            found[path] = float(value)
    if not {"optimizer.params.lr", "optimizer.params.muon_lr"} & set(found):
        found["optimizer.params.lr"] = peak_rate(tree["optimizer"].get("params", {}))
    return found


def at_power(common: Common, rates: Mapping[str, float], power: int) -> Common:
    """The run with all of the recipe's rates times 2^power."""
    named = any(path in PEAKS for path in rates)
    changed = {
        path: rate * 2.0**power
        for path, rate in rates.items()
        if not named or path.startswith("scheduler.")
    }
    return replace(common, deepspeed={**common.deepspeed, **changed})


def fitting_steps(recipe: Recipe, models: Sequence[WidthModel], n_runs: int, seconds: float) -> int:
    """The steps of each run that fit into the time if each model has so many; measures the steps'
    times. Raises ConfigError, TrainingError.
    """
    per_width = {}
    for model in models:
        if model.d_model not in per_width:
            per_width[model.d_model] = step_seconds([recipe], model.common)
    per_step = sum(per_width[model.d_model] for model in models) * n_runs
    return int(SHARE_OF_TRAINING * seconds / per_step) - EVALUATION_STEPS


def train(
    recipe: Recipe,
    model: WidthModel,
    rates: Mapping[str, float],
    powers: Sequence[int],
    steps: int,
    seeds: int,
    tell: Callable[[RateCurve, int], None],
) -> RateCurve:
    """Train a model with each rate, and with further ones while the best is at the grid's end.

    `tell`: called after each run with its power. Raises ConfigError.
    """
    curve = RateCurve(model.d_model, model.mup)
    todo, extra = list(powers), MOST_EXTRA
    while todo:
        power = todo.pop(0)
        curve.losses[power] = _loss(recipe, at_power(model.common, rates, power), steps, seeds)
        tell(curve, power)
        if not todo and extra and (beyond := curve.beyond) is not None:
            todo, extra = [beyond], extra - 1
    return curve


def _loss(recipe: Recipe, common: Common, steps: int, seeds: int) -> float:
    """The mean validation loss after whole runs; inf if one diverges."""
    losses = []
    for seed in range(1, seeds + 1):
        run = TrainingRun(recipe, common, steps, seed)
        try:
            run.advance(steps)
            losses.append(run.point().loss)
        except TrainingError:
            return math.inf
        finally:
            run.close()
    loss = statistics.fmean(losses)
    return loss if math.isfinite(loss) else math.inf


def as_record(curves: Sequence[RateCurve]) -> list[dict[str, Any]]:
    """What a record keeps of the curves. Raises UserError if they compare nothing."""
    diverged = [curve for curve in curves if not math.isfinite(curve.losses[curve.best])]
    if diverged:
        width = diverged[0].d_model
        raise UserError(
            f"nothing is recorded: width {width} diverged with every rate: name lower --powers"
        )
    if len(curves) < 2:
        raise UserError(
            f"nothing is recorded: {len(curves)} of the models have been trained with all rates;"
            " a comparison takes two"
        )
    return [
        {
            "d_model": curve.d_model,
            "mup": curve.mup,
            "powers": sorted(curve.losses),
            "losses": [
                loss if math.isfinite(loss := curve.losses[power]) else None
                for power in sorted(curve.losses)
            ],
            "best": curve.best,
            "vertex": curve.vertex,
            "at_end": curve.beyond is not None,
        }
        for curve in curves
    ]
