"""Fit the constants of efficiency.json to published step times, by descent without derivatives.

    python -m fgpt.plan.fit RUNS.jsonl          prints what it changes, and writes efficiency.json

One constant, or all of them in a random direction, is multiplied by a factor that shrinks, while
that lowers the loss: over sets that are not held out (`judge.HELD_OUT`), the mean of
|log(predicted / measured)|, in which a set of n rows weighs sqrt(n), and a small term that keeps
constants near those that the file has.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fgpt.plan.efficiency import EFFICIENCY, Efficiency, efficiencies
from fgpt.plan.judge import (
    APART,
    HELD_OUT,
    judge_times,
    percentile,
    predicted_time,
    render,
    timed_runs,
)
from fgpt.plan.published import PublishedRun, read_published

_GENERAL = ("matrix", "half_outputs", "half_depth", "memory", "link")
FITTED: Mapping[str, Sequence[str]] = {
    "a100": (
        *_GENERAL,
        "attention_forward",
        "attention_backward",
        "half_keys",
        "unaligned",
        "misaligned",
        "network",
        "network_us",
        "data_interference",
        "sync_us",
    ),
    "v100": (*_GENERAL, "unaligned", "sync_us"),
    "h100": (
        "matrix",
        "matrix_fp8",
        "half_depth_fp8",
        "link",
        "attention_forward",
        "attention_backward",
        "tensor_overlap",
        "data_interference",
    ),
    "gb200": ("matrix", "matrix_fp8", "half_depth_fp8"),
}
"""Constants that the rows of each kind of GPU determine. Shapes of the H100 rows are all large: its
half sizes and memory are from kernels measured on one H100 (`note` in efficiency.json)."""
BOUNDS: Mapping[str, tuple[float, float]] = {
    "matrix": (0.5, 0.9),
    "matrix_fp8": (0.4, 0.9),
    "memory": (0.6, 0.95),
    "link": (0.5, 0.9),
    "network": (0.5, 0.95),
    "misaligned": (0.7, 1.0),
    "unaligned": (0.02, 0.6),
    "tensor_overlap": (0.1, 0.95),
    "data_interference": (0.05, 2.0),
    "network_us": (5.0, 40.0),
    "half_depth": (20.0, 1000.0),
    "half_depth_fp8": (20.0, 2000.0),
    # Shah et al. 2024, figures 5 and 6: at most 640 and 550 of 989 TFLOP/s, causal
    "attention_forward": (0.2, 0.65),
    "attention_backward": (0.2, 0.55),
}
PRIOR_WEIGHT = 0.01
"""Loss of a constant that is e times as large as it was."""
FIRST_FACTOR, LAST_FACTOR = 1.3, 1.01
ENOUGH = 3e-4
"""Fall of the loss in one round of directions that keeps the factor."""
SEED = 1


def main(arguments: Sequence[str]) -> None:
    """Fit, print and write."""
    runs = timed_runs(read_published(Path(arguments[0])))
    constants = dict(efficiencies())
    document = json.loads(EFFICIENCY.read_text(encoding="utf-8"))
    for kind, names in FITTED.items():
        own = [run for run in runs if _kind(run) == kind]
        fitted = [run for run in own if run.set not in HELD_OUT]
        start = constants[kind]
        constants[kind] = _descend(kind, start, names, fitted)
        values = {name: _rounded(getattr(constants[kind], name)) for name in names}
        document["kinds"][kind].update(values, fitted_on=sorted({run.set for run in fitted}))
        print(f"{kind}: {len(fitted)} rows of {document['kinds'][kind]['fitted_on']}")
        for name in names:
            print(f"  {name}: {getattr(start, name):.4g} -> {values[name]:.4g}")
    low, high = _interval(runs, constants)
    document["common"].update(low=_rounded(low), high=_rounded(high))
    print(f"measured / predicted on rows that were not fitted: 10 % {low:.3f}, 90 % {high:.3f}")
    print(render(judge_times(runs, constants)))
    EFFICIENCY.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _descend(
    kind: str, start: Efficiency, names: Sequence[str], runs: Sequence[PublishedRun]
) -> Efficiency:
    draw = random.Random(SEED)
    best, factor = start, FIRST_FACTOR
    lowest = _loss(kind, best, start, names, runs)
    while factor > LAST_FACTOR:
        before = lowest
        directions = [{name: 1.0} for name in names]
        directions += [{name: draw.gauss(0, 0.5) for name in names} for _ in names]
        for direction in directions:
            for exponent in (1, -1):
                trial = _moved(best, direction, factor**exponent)
                loss = _loss(kind, trial, start, names, runs)
                if loss < lowest:
                    best, lowest = trial, loss
                    break
        if before - lowest < ENOUGH:
            factor = math.sqrt(factor)
    print(f"{kind}: loss {lowest:.4f}")
    return best


def _moved(constants: Efficiency, direction: Mapping[str, float], factor: float) -> Efficiency:
    values = {}
    for name, exponent in direction.items():
        low, high = BOUNDS.get(name, (0.0, math.inf))
        values[name] = min(max(getattr(constants, name) * factor**exponent, low), high)
    return replace(constants, **values)


def _loss(
    kind: str,
    trial: Efficiency,
    start: Efficiency,
    names: Sequence[str],
    runs: Sequence[PublishedRun],
) -> float:
    by_set: dict[str, list[float]] = {}
    for run in runs:
        by_set.setdefault(run.set, []).append(abs(math.log(_ratio(run, {kind: trial}))))
    weights = {name: math.sqrt(len(errors)) for name, errors in by_set.items()}
    total = sum(weights[name] * sum(errors) / len(errors) for name, errors in by_set.items())
    moved = sum(abs(math.log(getattr(trial, n) / getattr(start, n))) for n in names)
    return total / sum(weights.values()) + PRIOR_WEIGHT * moved / len(names)


def _interval(
    runs: Iterable[PublishedRun], constants: Mapping[str, Efficiency]
) -> tuple[float, float]:
    """10th and 90th percentile of measured / predicted on held-out sets, but for tests of tiny
    models.
    """
    held_out = [run for run in runs if run.set in HELD_OUT and run.set not in APART]
    ratios = sorted(1 / _ratio(run, constants) for run in held_out)
    return percentile(ratios, 10), percentile(ratios, 90)


def _ratio(run: PublishedRun, constants: Mapping[str, Efficiency]) -> float:
    assert run.step_s is not None  # timed
    return predicted_time(run, constants).total / run.step_s


def _kind(run: PublishedRun) -> str:
    return run.cluster.device.name.split("-")[0]


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main(sys.argv[1:])
