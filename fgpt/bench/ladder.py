"""A scaling ladder: one recipe trains one model at several widths, each for several computes.

Every run is a whole one with its own schedule, as a law is about runs that have decayed their
learning rate. All sizes get the same computes, in FLOPs, so the smaller ones see more tokens. The
law is fitted to the runs of all sizes but the largest, and predicts those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fgpt.bench.loss_law import LossLaw, Run, fit, refits, spread, undetermined
from fgpt.bench.recipe import Common, Recipe, TrainingRun, step_seconds
from fgpt.config.schema import ModelConfig, Shapes
from fgpt.errors import TrainingError, UserError
from fgpt.model.count import forward_flops_per_token, training_flops_per_token

WIDTHS = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
"""Widths of the sizes, as shares of the preset's. In the minutes in which the preset itself is
trained once, a dozen runs of it would all be far too short for a law."""
COMPUTES = (1 / 4, 1 / 2, 1)
"""Computes of a size's runs, as shares of the largest."""
WIDTH_MULTIPLE = 8


@dataclass(frozen=True)
class Size:
    """A model of the ladder."""

    common: Common
    """The run that all its runs have in common."""
    model: ModelConfig
    flops_per_step: float
    step_seconds: float
    """Measured."""

    @property
    def name(self) -> str:
        return f"{self.model.n_layer} x {self.model.d_model}"


@dataclass(frozen=True)
class PlannedRun:
    """A run of the ladder."""

    size: Size
    steps: int


@dataclass(frozen=True)
class LadderPoint:
    """A finished run."""

    d_model: int
    n_layer: int
    parameters: int
    """See `product_parameters`."""
    tokens: int
    flops: float
    """Of training."""
    epochs: float
    """How often the data was read."""
    seconds: float
    """Of training steps."""
    loss: float
    """Validation loss after the last step, in nats per token."""

    @property
    def run(self) -> Run:
        """As the law sees it."""
        return Run(self.parameters, self.tokens, self.loss)


@dataclass(frozen=True)
class Prediction:
    """A run of the size that was left out, and what the law says of it."""

    point: LadderPoint
    predicted: float
    lowest: float
    """Of the laws that were each fitted without one run."""
    highest: float


@dataclass(frozen=True)
class Ladder:
    """The law of a ladder's runs."""

    law: LossLaw
    refits: Sequence[LossLaw]
    """Each without one run."""
    fitted: Sequence[LadderPoint]
    predictions: Sequence[Prediction]
    """Of the largest size's runs, by tokens."""


def product_parameters(model: ModelConfig) -> int:
    """The weights of the matrix products that a token pays for: blocks and head. A tied head counts
    (its product costs as much as an untied one's); looking an embedding up does not.
    """
    return forward_flops_per_token(model, seq_len=0) // 2


def scaled_widths(model: ModelConfig) -> list[dict[str, int]]:
    """The model fields of each size, from narrow to wide.

    The depth stays. Heads keep their width where it divides the model's, else they take the widest
    one below that does; grouped queries, the MLP and a free width of heads stay in proportion.
    """
    shapes = Shapes.of(model)
    found = {}
    for share in WIDTHS:
        d_model = max(1, round(share * model.d_model / WIDTH_MULTIPLE)) * WIDTH_MULTIPLE
        d_head = shapes.d_head
        if d_head * model.n_head == model.d_model:
            even = [n for n in range(2, d_head + 1, 2) if d_model % n == 0]
            d_head = d_head if d_model % d_head == 0 else max(even)
            n_head = d_model // d_head
        else:
            n_head = max(1, round(share * model.n_head))
        most_kv = max(1, n_head * shapes.n_kv_head // model.n_head)
        n_kv_head = max(n for n in range(1, most_kv + 1) if n_head % n == 0)
        d_ff = round(shapes.d_ff * d_model / model.d_model)
        fields = {"d_model": d_model, "n_head": n_head, "d_head": d_head}
        found[d_model] = {**fields, "n_kv_head": n_kv_head, "d_ff": max(8, d_ff)}
    return [found[d_model] for d_model in sorted(found)]


def measured_sizes(recipe: Recipe, common: Common) -> list[Size]:
    """The sizes of the recipe's model; measures their steps. Raises ConfigError, TrainingError."""
    base = common.resolved(recipe, steps=1, seed=1).run.model
    sizes = []
    for fields in scaled_widths(base):
        run = {**common.run, **{f"model.{name}": value for name, value in fields.items()}}
        own = replace(common, run=run)
        resolved = own.resolved(recipe, steps=1, seed=1)
        tokens = resolved.batch.global_size * resolved.seq_len
        flops = tokens * training_flops_per_token(resolved.run.model, resolved.seq_len)
        sizes.append(Size(own, resolved.run.model, flops, step_seconds([recipe], own)))
    return sizes


def plan(sizes: Sequence[Size], seconds: float, most_steps: int | None = None) -> list[PlannedRun]:
    """Every size at every compute, the small computes first; `seconds`: of all training steps.

    `most_steps`: of the longest run. A ladder that is interrupted has all sizes at the first
    computes.
    """
    per_flop = sum(size.step_seconds / size.flops_per_step for size in sizes)
    flops = seconds / (per_flop * sum(COMPUTES))
    if most_steps is not None:
        flops = min(flops, most_steps * min(size.flops_per_step for size in sizes))
    return [
        PlannedRun(size, max(1, round(share * flops / size.flops_per_step)))
        for share in COMPUTES
        for size in sizes
    ]


def check_plan(runs: Sequence[PlannedRun]) -> None:
    """Raise UserError if these runs are too short to differ in length, as a law needs them to."""
    largest = max(product_parameters(planned.size.model) for planned in runs)
    points = [Run(product_parameters(each.size.model), each.steps, 1.0) for each in runs]
    if (why := undetermined([point for point in points if point.parameters < largest])) is not None:
        steps = [planned.steps for planned in runs]
        raise UserError(
            f"--ladder: its runs have {min(steps)} to {max(steps)} steps: {why} -> raise --minutes"
            " (or --steps)"
        )


def train(recipe: Recipe, runs: Sequence[PlannedRun]) -> Iterator[LadderPoint | TrainingError]:
    """Train each run; yield its point, or why it has none: it diverged. Raises ConfigError."""
    for planned in runs:
        try:
            yield _train(recipe, planned)
        except TrainingError as error:
            yield error


def _train(recipe: Recipe, planned: PlannedRun) -> LadderPoint:
    size = planned.size
    run = TrainingRun(recipe, size.common, planned.steps, seed=1)
    try:
        run.advance(planned.steps)
        point = run.point()
    finally:
        run.close()
    if not point.loss < math.log(size.model.vocab_size):  # nan, too
        raise TrainingError(
            f"{recipe.name}: validation loss {point.loss:.3f} after {planned.steps} steps is no"
            f" better than a guess: lower the learning rate in {recipe.deepspeed}"
        )
    return LadderPoint(
        size.model.d_model,
        size.model.n_layer,
        product_parameters(size.model),
        point.tokens,
        planned.steps * size.flops_per_step,
        planned.steps * run.train.global_batch / run.train.samples_per_epoch,
        point.seconds,
        point.loss,
    )


def conclude(points: Iterable[LadderPoint]) -> Ladder:
    """Fit all sizes but the largest, and predict that one. Raises UserError if they are too few."""
    points = sorted(points, key=lambda point: (point.parameters, point.tokens))
    largest = points[-1].parameters if points else 0
    fitted = [point for point in points if point.parameters < largest]
    runs = [point.run for point in fitted]
    law = fit(runs)
    laws = refits(runs)
    predictions = []
    for point in (point for point in points if point.parameters == largest):
        values = [each.predict(point.parameters, point.tokens) for each in (law, *laws)]
        predictions.append(Prediction(point, values[0], min(values), max(values)))
    return Ladder(law, laws, fitted, predictions)


def check_widths(model: ModelConfig) -> None:
    """Raise UserError if a model is too narrow for a ladder."""
    if len(found := scaled_widths(model)) < len(WIDTHS):
        raise UserError(
            f"model.d_model {model.d_model}: a ladder takes {len(WIDTHS)} widths from an eighth to"
            f" half of it, in multiples of {WIDTH_MULTIPLE}, and finds {len(found)} -> name a wider"
            " --model"
        )


def as_record(ladder: Ladder) -> dict[str, Any]:
    """What a record keeps of it."""
    law = ladder.law
    return {
        "constants": asdict(law),
        "spread": spread(ladder.refits),
        "points": [
            {**asdict(point), "predicted": law.predict(point.parameters, point.tokens)}
            for point in ladder.fitted
        ],
        "left_out": [
            {
                **asdict(each.point),
                "predicted": each.predicted,
                "lowest": each.lowest,
                "highest": each.highest,
            }
            for each in ladder.predictions
        ],
    }
