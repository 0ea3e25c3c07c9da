"""Recipes side by side: how many tokens and seconds each takes to a validation loss.

A recipe is a DeepSpeed JSON and a run file. All of them train the same model from the same initial
weights on the same samples in the same order, with the plain engine in one process. They advance
in turn, one stretch of steps each, so that a disturbance of the machine hits all of them; only
training steps are timed. Each seed gives other initial weights and another order of the samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fgpt.config.resolve import Resolved, RunRequest, resolve
from fgpt.config.run_file import Override
from fgpt.data.loader import MicroBatches
from fgpt.data.token_dataset import BlendedDataset
from fgpt.distributed.launch import World
from fgpt.engine.base import Engine
from fgpt.engine.build import build_engine
from fgpt.errors import TrainingError, UserError

EVALUATIONS = 24
"""Validation losses of a curve, after the first at step 0."""
VALID_BATCHES = 8
TIMED_STEPS = 4


class Point(NamedTuple):
    """A validation loss on the way."""

    tokens: int
    seconds: float
    """Of training steps."""
    loss: float


@dataclass(frozen=True)
class Recipe:
    """One way to train."""

    name: str
    deepspeed: Path
    """DeepSpeed JSON."""
    run_file: Path | None = None
    """For what the JSON has no key: a schedule, options of the model."""


@dataclass
class Curve:
    """One recipe with one seed."""

    recipe: Recipe
    seed: int
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Common:
    """What all recipes of a comparison have in common."""

    run: Mapping[str, Any]
    """Fields of the run file."""
    deepspeed: Mapping[str, Any]
    """Keys of the DeepSpeed JSON."""
    data: BlendedDataset
    device: torch.device

    def resolved(self, recipe: Recipe, steps: int, seed: int) -> Resolved:
        """The run of a recipe. Raises ConfigError."""
        length = {"train.steps": steps, "train.seed": seed, "data.seed": seed}
        return resolve_recipe(recipe, {**self.run, **length}, self.deepspeed, self.device)


def resolve_recipe(
    recipe: Recipe, run: Mapping[str, Any], deepspeed: Mapping[str, Any], device: torch.device
) -> Resolved:
    """The run of a recipe with these fields and keys, on the plain engine. Raises ConfigError."""
    origin = "fgpt bench recipe"
    values = {**run, "train.engine": "plain"}
    request = RunRequest(
        recipe.deepspeed,
        recipe.run_file,
        tuple(Override(key, value, origin) for key, value in values.items()),
        deepspeed_flags=tuple(Override(key, value, origin) for key, value in deepspeed.items()),
    )
    return resolve(request, world=1, device=device.type)


def check_comparable(resolved: Sequence[Resolved], recipes: Sequence[Recipe]) -> None:
    """Raise UserError where a recipe would train another size or on other data."""
    for recipe, other in zip(recipes, resolved, strict=True):
        for name in ("d_model", "n_layer", "n_head", "max_seq_len"):
            wanted, found = (getattr(r.run.model, name) for r in (resolved[0], other))
            if wanted != found:
                raise UserError(
                    f"--recipe {recipe.name}: model.{name} {found}, {recipes[0].name} has {wanted}:"
                    " leave it out of the run file; --model sets the size of all recipes"
                )
        if other.run.data.stages:
            raise UserError(
                f"--recipe {recipe.name}: data.stages: leave it out of the run file; --data is read"
                " by all recipes"
            )


def check_baseline(curve: Curve) -> None:
    """Raise TrainingError if there is no loss to reach: it ends above where it began."""
    first, last = curve.points[0].loss, curve.points[-1].loss
    if last > first:
        raise TrainingError(
            f"{curve.recipe.name}: seed {curve.seed} ends at validation loss {last:.3f} and began"
            f" at {first:.3f}, so the others have nothing to reach: lower the learning rate in"
            f" {curve.recipe.deepspeed}, or name another recipe first"
        )


def step_seconds(recipes: Sequence[Recipe], common: Common) -> float:
    """The time of a training step, summed over the recipes, measured now; it also warms up."""
    total = 0.0
    for recipe in recipes:
        run = TrainingRun(recipe, common, steps=2 * TIMED_STEPS, seed=1)
        run.advance(TIMED_STEPS)
        run.seconds = 0.0
        run.advance(TIMED_STEPS)
        run.close()
        total += run.seconds / TIMED_STEPS
    return total


def measure(
    recipes: Sequence[Recipe], common: Common, *, steps: int, seed: int
) -> Iterator[list[Curve]]:
    """Train every recipe; yield the curves so far after each of their stretches.

    Raises ConfigError, TrainingError.
    """
    runs = [TrainingRun(recipe, common, steps, seed) for recipe in recipes]
    curves = [Curve(recipe, seed) for recipe in recipes]
    marks = sorted({round(steps * i / EVALUATIONS) for i in range(EVALUATIONS + 1)})
    for mark in marks:
        for run, curve in zip(runs, curves, strict=True):
            run.advance(mark - run.engine.step)
            curve.points.append(run.point())
        yield curves
    for run in runs:
        run.close()


class TrainingRun:
    """A recipe in training."""

    def __init__(self, recipe: Recipe, common: Common, steps: int, seed: int):
        self.recipe = recipe
        self.resolved = resolved = common.resolved(recipe, steps, seed)
        self.engine: Engine = build_engine(resolved, World(), common.device)
        options, batch = resolved.run.data, resolved.batch

        def batches(split: str, seed: int) -> MicroBatches:
            return MicroBatches(
                common.data.samples(split, options, resolved.seq_len, seed=seed),
                micro=batch.micro,
                accumulation=batch.accumulation,
                prefetch=0,
                reset_positions=options.reset_positions,
            )

        self.train = batches("train", options.seed)
        self.valid = batches("valid", 0)
        per_epoch = self.valid.samples_per_epoch // self.valid.global_batch
        self.n_valid = max(1, min(VALID_BATCHES, per_epoch))
        self.seconds = 0.0

    def advance(self, steps: int) -> None:
        """Take training steps."""
        start = time.perf_counter()
        for _ in range(steps):
            pending = self.engine.train_batch(self.train.at(self.engine.step))
        if steps:
            loss = pending.result().loss  # waits for the device
            self.seconds += time.perf_counter() - start
            if not torch.isfinite(torch.tensor(loss)):
                raise TrainingError(
                    f"{self.recipe.name}: the loss is {loss} after {self.engine.step} steps: lower"
                    f" its learning rate in {self.recipe.deepspeed}, or leave the recipe out"
                )

    def point(self) -> Point:
        """Evaluate now."""
        tokens = self.engine.step * self.resolved.batch.global_size * self.resolved.seq_len
        losses = [self.engine.eval_batches(self.valid.at(i)) for i in range(self.n_valid)]
        return Point(tokens, self.seconds, float(torch.stack(losses).mean()))

    def close(self) -> None:
        self.engine.close()


def reached(points: Sequence[Point], loss: float) -> tuple[float, float] | None:
    """(tokens, seconds) at which a curve first has this loss, on straight lines between its points;
    None: it never has.
    """
    for before, after in zip(points, points[1:], strict=False):
        if after.loss <= loss:
            share = (before.loss - loss) / (before.loss - after.loss) if before.loss > loss else 0.0
            return (
                before.tokens + share * (after.tokens - before.tokens),
                before.seconds + share * (after.seconds - before.seconds),
            )
    return None


def summary(curves: Sequence[Curve], baseline: str) -> dict[str, dict[str, list[float] | None]]:
    """Recipe -> name -> [median, lowest, highest] over the seeds.

    loss: at the end; step: seconds of a step; tokens, seconds: to the loss with which the baseline
    of the same seed ends, as a share of what it took itself; None where a seed never gets there.
    """
    ends = {c.seed: c.points[-1] for c in curves if c.recipe.name == baseline}
    found: dict[str, dict[str, list[float] | None]] = {}
    for name in dict.fromkeys(curve.recipe.name for curve in curves):
        own = [curve for curve in curves if curve.recipe.name == name]
        shares = [_shares(curve, ends[curve.seed]) for curve in own]
        found[name] = {
            "loss": _three([curve.points[-1].loss for curve in own]),
            "step_time": _three([c.points[-1].seconds / ends[c.seed].seconds for c in own]),
            "tokens": _three([share and share[0] for share in shares]),
            "seconds": _three([share and share[1] for share in shares]),
        }
    return found


def _shares(curve: Curve, end: Point) -> tuple[float, float] | None:
    at = reached(curve.points, end.loss)
    return at and (at[0] / end.tokens, at[1] / end.seconds)


def _three(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return [statistics.median(known), min(known), max(known)]
