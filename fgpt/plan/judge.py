"""How far predicted step times are from published ones, by set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fgpt.plan.efficiency import Efficiency, efficiency_of
from fgpt.plan.planned_run import PlannedRun
from fgpt.plan.published import PublishedRun
from fgpt.plan.time import StepTime, step_time

QUALITIES = ("A", "B")
"""Of rows that count; C is noisy."""
HELD_OUT = (
    "vtrain-multi",
    "megatron-2021-01",
    "internevo-7b",
    "torchtitan-2024-a100",
    "bigscience-104b",
    "megatron-deepspeed-rebase",
    "megatron-golden-values",
)
"""Sets that no constant was fitted on, beside those that are not known yet."""
APART = ("megatron-golden-values",)
"""Tests of tiny models, whose time is the host's: outside of the totals."""
MICRO_BATCHES = (1, 2, 4, 8, 16)
"""Tried where a row does not publish its micro-batch."""


@dataclass(frozen=True)
class SetError:
    """Relative errors of one set: predicted / published - 1."""

    name: str
    is_fitted: bool
    n: int
    median: float
    """Of absolute errors."""
    p90: float
    """90th percentile of absolute errors."""
    worst: float
    """With its sign."""
    worst_id: str
    bias: float
    """Median of errors with their sign."""


def predicted_time(
    published: PublishedRun, constants: Mapping[str, Efficiency] | None = None
) -> StepTime:
    """Return the step time; where the micro-batch is not published, that of the fastest.

    `constants`: GPU kind -> constants, default those of efficiency.json.
    """
    kind = published.cluster.device.name.split("-")[0]
    efficiency = constants[kind] if constants else efficiency_of(kind)
    runs = [published.run] if published.micro_is_published else _micro_batches(published.run)
    times = [step_time(run, published.cluster, efficiency) for run in runs]
    return min(times, key=lambda time: time.total)


def _micro_batches(run: PlannedRun) -> list[PlannedRun]:
    samples = run.micro * run.accumulation
    return [
        replace(run, micro=micro, accumulation=samples // micro)
        for micro in MICRO_BATCHES
        if samples % micro == 0
    ]


def timed_runs(runs: Iterable[PublishedRun]) -> list[PublishedRun]:
    """Return the runs whose step time counts."""
    return [run for run in runs if run.step_s is not None and run.quality in QUALITIES]


def judge_times(
    runs: Iterable[PublishedRun], constants: Mapping[str, Efficiency] | None = None
) -> list[SetError]:
    """Return the errors of each set of runs, those of all fitted, all held-out and all sets.

    `constants`: as for `predicted_time`.
    """
    errors: dict[str, dict[str, float]] = {}
    for run in timed_runs(runs):
        assert run.step_s is not None  # timed
        error = predicted_time(run, constants).total / run.step_s - 1
        errors.setdefault(run.set, {})[run.id] = error
    rows = [_set_error(name, name not in HELD_OUT, e) for name, e in errors.items()]
    rows.sort(key=lambda row: (not row.is_fitted, row.name in APART))
    counted = {name: e for name, e in errors.items() if name not in APART}
    for title, fitted in (
        ("all fitted", (True,)),
        ("all held out", (False,)),
        ("all", (True, False)),
    ):
        joined = {
            key: value
            for name, e in counted.items()
            for key, value in e.items()
            if (name not in HELD_OUT) in fitted
        }
        if joined:
            rows.append(_set_error(title, title == "all fitted", joined))
    return rows


def _set_error(name: str, is_fitted: bool, errors: Mapping[str, float]) -> SetError:
    signed = sorted(errors.values())
    sizes = sorted(abs(error) for error in signed)
    worst_id = max(errors, key=lambda key: abs(errors[key]))
    return SetError(
        name=name,
        is_fitted=is_fitted,
        n=len(sizes),
        median=percentile(sizes, 50),
        p90=percentile(sizes, 90),
        worst=errors[worst_id],
        worst_id=worst_id,
        bias=percentile(signed, 50),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of ordered values, between neighbours in proportion."""
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def render(rows: Sequence[SetError]) -> str:
    """Return a Markdown table; errors in per cent."""
    lines = [
        "| set | rows | fitted | median | 90 % | worst | bias | worst row |",
        "|---|--:|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        numbers = f"{row.median:.1%} | {row.p90:.1%} | {row.worst:+.1%} | {row.bias:+.1%}"
        fitted = "yes" if row.is_fitted else "no"
        lines.append(f"| {row.name} | {row.n} | {fitted} | {numbers} | {row.worst_id} |")
    return "\n".join(lines)
