"""Measuring scenarios side by side: what disturbs one disturbs all.

Scenarios are measured in waves, whose ranks live at the same time and take turns, round by round.
On a CPU a wave holds as many as memory allows, the reference among them; on GPUs, which nothing
disturbs and whose memory is for one, each scenario is a wave of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fgpt.bench.job import Job
from fgpt.bench.scenarios import Scenario
from fgpt.bench.worker_group import WorkerGroup, WorkerGroupFailed

Extras = Callable[[WorkerGroup, Scenario], dict[str, Any]]
"""What a scenario's ranks are asked in the end; its answers go into the record."""
MIN_ROUNDS = 3
MAX_ROUNDS = 9
KINDS = ("train", "predict")


@dataclass
class Measured:
    """What was found out about one scenario."""

    scenario: Scenario
    job: Job
    first: dict[str, Any] = field(default_factory=dict)
    """What the ranks say of the first steps; see `Rank.introduce`."""
    round_s: dict[str, list[float]] = field(default_factory=lambda: {k: [] for k in KINDS})
    """Seconds of each round."""
    more: dict[str, Any] = field(default_factory=dict)
    """Shares, bytes sent, a trace."""
    why: str | None = None
    """Why it could not be measured."""

    def batch_s(self, kind: str) -> list[float]:
        """Seconds of one global batch, round by round."""
        return [seconds / self.first["batches"][kind] for seconds in self.round_s[kind]]


def relative(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Speed of `one` relative to `other`, from their times round by round: median, lowest, highest
    of the ratios. 1.0: as fast.
    """
    ratios = [b / a for a, b in zip(one, other, strict=False)]  # an interrupted wave may lack one
    return statistics.median(ratios), min(ratios), max(ratios)


def waves(scenarios: Sequence[Scenario], limit: int) -> Iterator[list[Scenario]]:
    """Cut into waves of at most `limit` scenarios of one row and section.

    Each wave of several begins with the reference, wherever that is in the list.
    """
    of_reference: dict[tuple[str, str], list[Scenario]] = {}
    for scenario in scenarios:
        of_reference.setdefault((scenario.row.name, scenario.reference), []).append(scenario)
    for (_, reference), members in of_reference.items():
        first = [s for s in members if s.rung.name == reference]
        others = [s for s in members if s.rung.name != reference]
        room = max(1, limit - len(first)) if limit > 1 else 1
        if limit == 1 or not others:
            others = members
            first = []
        for start in range(0, len(others), room):
            yield first + others[start : start + room]


def measure(
    wave: Sequence[tuple[Scenario, Job]],
    budget_s: float,
    start: Callable[[Job], WorkerGroup],
    say: Callable[[str], None],
    extras: Extras,
) -> list[Measured]:
    """Measure a wave for about `budget_s` seconds, start and end included.

    `start`: starts a job's ranks; `extras`: asked of each scenario's ranks in the end.
    """
    deadline = time.monotonic() + budget_s
    found = [Measured(scenario, job) for scenario, job in wave]
    with ExitStack() as open_teams:
        teams: dict[int, WorkerGroup] = {}
        numbered = list(enumerate(found))
        for pair in (numbered[i : i + 2] for i in range(0, len(numbered), 2)):
            # two at a time: importing takes one core
            for number, one in pair:
                with _failure_noted(one):
                    teams[number] = open_teams.enter_context(start(one.job))
            for number, one in pair:
                _try(one, teams, number, lambda team: team.here())
        for number, one in numbered:
            _try(one, teams, number, partial(_begin, one, say))
        turn = 0
        while _another(turn, teams, deadline):
            order = list(teams)
            for number in order[turn % len(order) :] + order[: turn % len(order)]:
                one = found[number]
                _try(one, teams, number, partial(_round, one))
            turn += 1
        for number in list(teams):
            one = found[number]
            _try(one, teams, number, partial(_more, one, extras))
    return found


def _another(turn: int, teams: Mapping[int, WorkerGroup], deadline: float) -> bool:
    """Whether there is to be one more round."""
    if not teams or turn >= min([MAX_ROUNDS, *(team.max_rounds for team in teams.values())]):
        return False
    return turn < MIN_ROUNDS or time.monotonic() < deadline


def _try(
    one: Measured, teams: dict[int, WorkerGroup], number: int, do: Callable[[WorkerGroup], None]
) -> None:
    """A scenario that fails leaves the wave, with the reason; the others go on."""
    if number not in teams:
        return
    with _failure_noted(one):
        do(teams[number])
    if one.why is not None:
        teams.pop(number).end()


@contextmanager
def _failure_noted(one: Measured) -> Iterator[None]:
    try:
        yield
    except WorkerGroupFailed as error:
        one.why = str(error)


def _begin(one: Measured, say: Callable[[str], None], team: WorkerGroup) -> None:
    team.ready()
    one.first = team.first
    say(f"{one.scenario.row.name}, {one.scenario.rung.name}: ready in {one.first['setup_s']:.1f} s")


def _round(one: Measured, team: WorkerGroup) -> None:
    for kind in KINDS:
        one.round_s[kind].append(team.ask(kind)["round_s"])


def _more(one: Measured, extras: Extras, team: WorkerGroup) -> None:
    try:
        one.more = extras(team, one.scenario)
    except WorkerGroupFailed as error:  # what was measured before stands
        one.more = {"extras": str(error)}
