"""The values of a training run that its page draws, against steps, tokens and time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from fgpt.report.run_record import RunRecord, finite, is_number

T = TypeVar("T")
MAX_POINTS = 1500
"""Of a line; of longer runs each point is the mean of equally many steps."""


@dataclass(frozen=True)
class Chart:
    """One chart of the page."""

    key: str
    title: str
    unit: str
    series: tuple[str, ...]
    """Names of the values in a run's records."""
    log: bool = False
    """Whether its vertical axis is logarithmic."""
    zero: bool = False
    """Whether its vertical axis begins at 0."""


CHARTS = (
    Chart("loss", "Loss", "nats per token", ("loss", "valid_loss")),
    Chart("rate", "Learning rate", "", ("learning_rate",), zero=True),
    Chart("norm", "Gradient norm", "before clipping, logarithmic", ("grad_norm",), log=True),
    Chart("speed", "Throughput", "tokens/s", ("tokens_per_s",), zero=True),
    Chart("mfu", "Model FLOPs utilization", "of the device's peak", ("mfu",), zero=True),
    Chart("memory", "Peak memory", "GiB, rank 0", ("memory_gib",), zero=True),
    Chart("wait", "Waiting for data", "share of the time", ("data_wait",), zero=True),
    Chart("skipped", "Skipped steps", "so far", ("skipped_so_far",), zero=True),
    Chart("scale", "Loss scale", "fp16, logarithmic", ("loss_scale",), log=True),
)


def charts_of(runs: Sequence[RunRecord], series: Sequence[dict[str, Any]]) -> list[Chart]:
    """Return the charts for which these runs have values."""
    names = dict.fromkeys(name for run in runs for name in run.records.suites)
    suites = [
        Chart(f"suite-{i}", name, "accuracy", (f"suite {name}",)) for i, name in enumerate(names)
    ]
    has = {name for each in series for name in each}
    return [chart for chart in (*CHARTS, *suites) if has & set(chart.series)]


def series_of(run: RunRecord) -> dict[str, Any]:
    """Name of a value -> its places on each axis, and the values."""
    hours = [seconds / 3600 for seconds in accumulate(r["step_s"] for r in run.records.steps)]
    numbers = [record["step"] for record in run.records.steps]
    x = {"step": numbers, "tokens": [run.tokens(n) for n in numbers], "hours": hours}
    skipped = list(accumulate(int(record["skipped"]) for record in run.records.steps))
    columns: dict[str, list[float | None]] = {
        name: finite([_number_or_none(record.get(name)) for record in run.records.steps])
        for name in {name for chart in CHARTS for name in chart.series}
    }
    columns["loss"] = finite([None if r["skipped"] else r["loss"] for r in run.records.steps])
    columns["skipped_so_far"] = [*map(float, skipped)] if any(skipped) else []
    places = _thinned(x)
    series: dict[str, Any] = {
        name: {"x": places, "y": _means(values)}
        for name, values in columns.items()
        if any(value is not None for value in values)
    }
    at = dict(zip(numbers, hours, strict=True))
    measured = {"valid_loss": run.records.evaluations}
    measured |= {f"suite {name}": points for name, points in run.records.suites.items()}
    for name, all_points in measured.items():
        points = evenly(all_points, MAX_POINTS)
        steps = [step for step, _ in points]
        at_steps = {
            "step": steps,
            "tokens": [run.tokens(step) for step in steps],
            "hours": [at.get(step, 0.0) for step in steps],
        }
        if points:
            series[name] = {"x": at_steps, "y": finite([y for _, y in points]), "measured": True}
    return series


def _number_or_none(value: Any) -> float | None:
    return value if is_number(value) else None


def _bucket(n: int) -> int:
    """Steps of one point."""
    return max(1, -(-n // MAX_POINTS))


def _thinned(x: dict[str, list[float]]) -> dict[str, list[float]]:
    size = _bucket(len(x["step"]))
    return {
        axis: [places[min(i + size, len(places)) - 1] for i in range(0, len(places), size)]
        for axis, places in x.items()
    }


def _means(values: Sequence[float | None]) -> list[float | None]:
    size = _bucket(len(values))
    groups = (
        [v for v in values[i : i + size] if v is not None] for i in range(0, len(values), size)
    )
    return [float(f"{statistics.fmean(group):.6g}") if group else None for group in groups]


def evenly(items: Sequence[T], n: int) -> list[T]:
    """At most n of the items, at equal distances, the last one among them."""
    stride = max(1, -(-len(items) // n))
    return list(items[(len(items) - 1) % stride :: stride])
