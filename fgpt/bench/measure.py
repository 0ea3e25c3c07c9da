"""Measures scenarios side by side, so that a disturbance of the machine hits all of them alike.

Scenarios are measured in cohorts, whose ranks are alive at the same time and run one round each in
turn. On a CPU a cohort holds as many scenarios as fit into memory, the reference among them. On
GPUs, which are not shared and whose memory holds one, each scenario is a cohort.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fgpt.bench.job import Job
from fgpt.bench.scenarios import Scenario
from fgpt.bench.worker_group import WorkerGroup, WorkerGroupFailed

RequestDetails = Callable[[WorkerGroup, Scenario], dict[str, Any]]
"""Requests a scenario's time breakdown or trace after its last round."""
MIN_ROUNDS = 3
MAX_ROUNDS = 9
KINDS = ("train", "predict")


@dataclass(eq=False)
class ScenarioRun:
    """The measurements of one scenario."""

    scenario: Scenario
    job: Job
    warmup: dict[str, Any] = field(default_factory=dict)
    """See `Worker.warmup_report`."""
    round_s: dict[str, list[float]] = field(default_factory=lambda: {k: [] for k in KINDS})
    """Seconds of each round, by kind."""
    details: dict[str, Any] = field(default_factory=dict)
    """Time breakdown, bytes sent, trace."""
    failure: str | None = None
    """Why the scenario could not be measured."""

    def batch_s(self, kind: str) -> list[float]:
        """Seconds per global batch, round by round."""
        return [seconds / self.warmup["batches"][kind] for seconds in self.round_s[kind]]


def relative_speed(
    seconds: Sequence[float], reference_s: Sequence[float]
) -> tuple[float, float, float]:
    """Median, lowest and highest of reference_s / seconds, round by round (1.0: equally fast)."""
    # an interrupted cohort may lack one round
    ratios = [b / a for a, b in zip(seconds, reference_s, strict=False)]
    return statistics.median(ratios), min(ratios), max(ratios)


def split_into_cohorts(scenarios: Sequence[Scenario], limit: int) -> Iterator[list[Scenario]]:
    """Yield cohorts of at most `limit` scenarios that share workload and reference.

    A cohort of several scenarios begins with the reference, wherever that is in the list.
    """
    by_reference: dict[tuple[str, str], list[Scenario]] = {}
    for scenario in scenarios:
        key = scenario.workload.name, scenario.reference
        by_reference.setdefault(key, []).append(scenario)
    for (_, name), members in by_reference.items():
        reference = [s for s in members if s.variant.name == name]
        others = [s for s in members if s.variant.name != name]
        if limit == 1 or not others:
            reference, others = [], members
        size = max(1, limit - len(reference))
        for start in range(0, len(others), size):
            yield reference + others[start : start + size]


def measure(
    cohort: Sequence[tuple[Scenario, Job]],
    budget_s: float,
    start: Callable[[Job], WorkerGroup],
    say: Callable[[str], None],
    request_details: RequestDetails,
) -> list[ScenarioRun]:
    """Measure a cohort for about `budget_s` seconds, starting and ending the ranks included.

    `start` starts the ranks of a job; `say` prints progress.
    """
    deadline = time.monotonic() + budget_s
    runs = [ScenarioRun(scenario, job) for scenario, job in cohort]
    groups: dict[ScenarioRun, WorkerGroup] = {}
    with ExitStack() as stack:
        # two at a time: importing is single-threaded
        for pair in (runs[i : i + 2] for i in range(0, len(runs), 2)):
            for run in pair:
                with _record_failure(run):
                    groups[run] = stack.enter_context(start(run.job))
            for run in pair:
                _attempt(run, groups, lambda group: group.wait_until_started())
        for run in runs:
            _attempt(run, groups, partial(_warm_up, run, say))
        n_rounds = 0
        while _has_time(n_rounds, groups.values(), deadline):
            order = [*groups]
            first = n_rounds % len(order)  # rotate, so that none always follows the same one
            for run in order[first:] + order[:first]:
                _attempt(run, groups, partial(_time_round, run))
            n_rounds += 1
        for run in [*groups]:
            _attempt(run, groups, partial(_collect_details, run, request_details))
    return runs


def _has_time(n_rounds: int, groups: Collection[WorkerGroup], deadline: float) -> bool:
    """Whether to measure another round."""
    if not groups or n_rounds >= min([MAX_ROUNDS, *(group.max_rounds for group in groups)]):
        return False
    return n_rounds < MIN_ROUNDS or time.monotonic() < deadline


def _attempt(
    run: ScenarioRun,
    groups: dict[ScenarioRun, WorkerGroup],
    action: Callable[[WorkerGroup], None],
) -> None:
    """Run an action; a scenario that fails leaves the cohort, and the others continue."""
    if run not in groups:
        return
    with _record_failure(run):
        action(groups[run])
    if run.failure is not None:
        groups.pop(run).end()


@contextmanager
def _record_failure(run: ScenarioRun) -> Iterator[None]:
    try:
        yield
    except WorkerGroupFailed as error:
        run.failure = str(error)


def _warm_up(run: ScenarioRun, say: Callable[[str], None], group: WorkerGroup) -> None:
    group.run_warmup()
    run.warmup = group.warmup
    say(f"{run.scenario.label}: ready in {run.warmup['setup_s']:.1f} s")


def _time_round(run: ScenarioRun, group: WorkerGroup) -> None:
    for kind in KINDS:
        run.round_s[kind].append(group.request(kind)["round_s"])


def _collect_details(run: ScenarioRun, request: RequestDetails, group: WorkerGroup) -> None:
    try:
        run.details = request(group, run.scenario)
    except WorkerGroupFailed as error:  # the timings remain valid
        run.details = {"extras": str(error)}
