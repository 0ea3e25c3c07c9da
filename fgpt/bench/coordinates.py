"""The coordinate check of muP (Yang et al. 2022, appendix D.1): how far the first steps move the
activations of models of several widths.

With muP the change of every activation is about the same for all widths; without it, it grows with
the width, so that a rate that suits a narrow model is too high for a wide one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from fgpt.bench.recipe import Common, Recipe, TrainingRun
from fgpt.bench.width import WidthModel
from fgpt.errors import UserError

LOGITS = "logits"
WITH, WITHOUT = "mup", "standard"
CONSTANT_RATE: Mapping[str, Any] = {
    "schedule.kind": "constant",
    "schedule.warmup_steps": 0,
    "schedule.total_steps": None,
    "schedule.decay_steps": None,
    "schedule.decay_shape": None,
    "schedule.min_ratio": None,
    "schedule.momentum_warmup_steps": 0,
    "schedule.momentum_start": None,
}


@dataclass(frozen=True)
class Activation:
    """An activation of one model in training: root mean squares over a batch's elements."""

    sizes: list[float]
    """At the start and after each step."""
    changes: list[float]
    """After each step, of the difference from the start."""


def at_constant_rate(common: Common) -> Common:
    """The run without a schedule, at the rates in the recipe's optimizer.params; its head returns
    the logits.
    """
    run = {**common.run, **CONSTANT_RATE, "speed.loss": "plain"}
    return replace(common, run=run, deepspeed={**common.deepspeed, "scheduler": None})


def modules(n_layer: int) -> dict[str, str]:
    """Activation -> the module whose output it is: of the first and last block, and the ends."""
    blocks = dict.fromkeys(f"blocks.{i}.{name}" for i in (0, n_layer - 1)
                           for name in ("attention", "mlp"))  # fmt: skip
    names = ["embedding", *blocks, f"blocks.{n_layer - 1}", "final_norm"]
    return {**{name: name for name in names}, LOGITS: "head"}


def trace(recipe: Recipe, model: WidthModel, steps: int, seed: int) -> dict[str, Activation]:
    """Train for some steps, and follow the activations on one batch of validation data.

    `model`: at a constant rate. Raises ConfigError, TrainingError.
    """
    run = TrainingRun(recipe, model.common, steps, seed)
    names = modules(run.resolved.run.model.n_layer)
    outputs: dict[str, Tensor] = {}
    hooks = [
        run.engine.model.get_submodule(module).register_forward_hook(partial(_keep, outputs, name))
        for name, module in names.items()
    ]
    batch = run.valid.at(0)[:1]
    try:
        run.engine.eval_batches(batch)
        first = dict(outputs)
        found = {name: Activation([_rms(output)], []) for name, output in first.items()}
        for _ in range(steps):
            run.advance(1)
            run.engine.eval_batches(batch)
            for name, activation in found.items():
                activation.sizes.append(_rms(outputs[name]))
                activation.changes.append(_rms(outputs[name] - first[name]))
    finally:
        for hook in hooks:
            hook.remove()
        run.close()
    return found


def _keep(
    outputs: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Tensor
) -> None:
    outputs[name] = output.detach().float()


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def slope(widths: Sequence[int], changes: Sequence[float]) -> float:
    """The exponent p of change = c width^p, by least squares of the logarithms."""
    return statistics.linear_regression(_logs(widths), _logs(changes)).slope


def _logs(values: Sequence[float]) -> list[float]:
    return [math.log(value) for value in values]


def mean_over_seeds(traces: Sequence[Mapping[str, Activation]]) -> dict[str, Activation]:
    """The means of one model's activations over the seeds."""

    def means(lists: Sequence[list[float]]) -> list[float]:
        return [statistics.fmean(values) for values in zip(*lists, strict=True)]

    return {
        name: Activation(
            means([trace[name].sizes for trace in traces]),
            means([trace[name].changes for trace in traces]),
        )
        for name in traces[0]
    }


def as_record(found: Sequence[tuple[WidthModel, Mapping[str, Activation]]]) -> dict[str, Any]:
    """What a record keeps: activation -> with muP and without -> sizes and changes of each width,
    and the slope after the last step. Raises UserError if an activation did not change.
    """
    base = found[0]
    record: dict[str, Any] = {}
    for name in base[1]:
        record[name] = {}
        for kind in (WITH, WITHOUT):
            own = [base, *(pair for pair in found[1:] if pair[0].mup == (kind == WITH))]
            widths = [model.d_model for model, _ in own]
            last = [activations[name].changes[-1] for _, activations in own]
            if not min(last) > 0:
                raise UserError(
                    f"nothing is recorded: {name} of width {widths[last.index(min(last))]} did not"
                    " change: raise the learning rate or --steps"
                )
            record[name][kind] = {
                "slope": slope(widths, last),
                "changes": [activations[name].changes for _, activations in own],
                "sizes": [activations[name].sizes for _, activations in own],
            }
    return record
