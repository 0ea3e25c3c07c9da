"""Measures scenarios side by side, so that a disturbance of the machine hits all of them alike.

Scenarios are measured in cohorts, whose ranks are alive at the same time and run one round each in
turn. On a CPU a cohort holds as many scenarios as fit into memory, the reference among them. On
GPUs, which are not shared and whose memory holds one, each scenario is a cohort.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fgpt.bench.job import Job
from fgpt.bench.scenarios import Scenario
from fgpt.bench.worker_group import WorkerGroup, WorkerGroupFailed

RequestDetails = Callable[[WorkerGroup, Scenario], dict[str, Any]]
"""Requests a scenario's time breakdown or trace after its last round."""
ENOUGH_ROUNDS = 3
"""Fewer, because the time is over, are said: they show no spread."""
MAX_ROUNDS = 9
NO_TIME = "no time was left: --minutes gives more"
KINDS = ("train", "predict")


@dataclass
class ScenarioRun:
    """The ranks and the measurements of one scenario."""

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
    out_of_time: bool = False
    """The time was over before its first round."""
    group: WorkerGroup | None = None
    """The ranks while they are alive."""

    def attempt(self, action: Callable[[WorkerGroup], None]) -> None:
        """Run an action on the ranks, if alive; a failure ends them, and is recorded."""
        if self.group is None:
            return
        try:
            action(self.group)
        except WorkerGroupFailed as error:
            self.failure = str(error)
            self.group.end()
            self.group = None

    def warm_up(self, group: WorkerGroup) -> None:
        """Build the target and take the warmup steps."""
        group.run_warmup()
        self.warmup = group.warmup

    def time_round(self, group: WorkerGroup) -> None:
        """Measure one round of each kind."""
        for kind in KINDS:
            self.round_s[kind].append(group.request(kind)["round_s"])

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
    log: Callable[[str], None],
    request_details: RequestDetails,
) -> list[ScenarioRun]:
    """Measure a cohort within `budget_s` seconds, starting the ranks included.

    When the time is over, no further scenario is begun and no further round. A scenario that fails
    leaves the cohort. `start` starts the ranks of a job.
    """
    deadline = time.monotonic() + budget_s
    runs = [ScenarioRun(scenario, job) for scenario, job in cohort]
    with ExitStack() as stack:
        # 1. start, two at a time: importing is single-threaded
        for pair in (runs[i : i + 2] for i in range(0, len(runs), 2)):
            if _is_over(deadline, runs, pair):
                continue
            for run in pair:
                try:
                    run.group = stack.enter_context(start(run.job))
                except WorkerGroupFailed as error:
                    run.failure = str(error)
            for run in pair:
                run.attempt(lambda group: group.wait_until_started())
        # 2. warmup steps, one scenario after the other
        for run in runs:
            if run.group is None or _is_over(deadline, runs, [run]):
                continue
            run.attempt(run.warm_up)
            if run.group is not None:
                log(f"{run.scenario.label}: ready in {run.warmup['setup_s']:.1f} s")
        _time_rounds(runs, deadline)
        # 3. time breakdowns and traces; the timings remain valid if these fail
        for run in runs:
            if run.group is not None:
                try:
                    run.details = request_details(run.group, run.scenario)
                except WorkerGroupFailed as error:
                    run.details = {"extras": str(error)}
    return runs


def _is_over(
    deadline: float, runs: Sequence[ScenarioRun], next_ones: Sequence[ScenarioRun]
) -> bool:
    """Whether the time is over for these; the first two are measured in any case."""
    if time.monotonic() < deadline or next_ones[0] in runs[:2]:
        return False
    for run in next_ones:
        run.out_of_time = True
        if run.group is not None:
            run.group.end()
            run.group = None
    return True


def _time_rounds(runs: Sequence[ScenarioRun], deadline: float) -> None:
    """Measure rounds until the deadline, at least one and at most `MAX_ROUNDS`."""
    for n in range(MAX_ROUNDS):
        active = [(run, run.group) for run in runs if run.group is not None]
        if not active or n >= min(group.max_rounds for _, group in active):
            return
        if n and time.monotonic() >= deadline:
            return
        first = n % len(active)  # rotate, so that none always follows the same one
        for run, _ in active[first:] + active[:first]:
            run.attempt(run.time_round)
