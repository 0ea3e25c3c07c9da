"""How far predicted memory is from published runs, by set."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fgpt.plan.footprint import GIB, fits, fitted_sets, rank_memory, worst_stage
from fgpt.plan.published import PublishedRun


@dataclass(frozen=True)
class MemoryCase:
    """One published run beside what is predicted of it. GiB."""

    id: str
    predicted: float
    measured: float | None
    """None: not published."""
    ran: bool
    """False: it was out of memory."""
    said_to_fit: bool

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        assert self.measured is not None
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class SetErrors:
    """The errors of one set of published runs. Shares, not per cent."""

    set: str
    n: int
    """Runs with a measured figure."""
    is_fitted: bool
    """Whether a number of allowances.json was fitted on it."""
    median: float | None
    """Of the errors' absolute values."""
    worst: float | None
    """The error that is largest in absolute value."""
    worst_id: str
    bias: float | None
    """Mean error: positive where too much is predicted."""
    out_of_memory: int
    """Runs that were out of memory,"""
    out_of_memory_found: int
    """and those of them that are said not to fit."""
    ran: int
    """Runs that were not out of memory, measured or not,"""
    wrongly_impossible: tuple[str, ...]
    """and those of them that are said not to fit."""


def judge_memory(runs: Iterable[PublishedRun]) -> list[SetErrors]:
    """Compare predicted with published memory, set by set: rows of quality A and B only."""
    cases: dict[str, list[MemoryCase]] = defaultdict(list)
    for published in runs:
        if published.quality in ("A", "B"):
            cases[published.set].append(memory_case(published))
    return [_errors(name, of_set) for name, of_set in sorted(cases.items())]


def memory_case(published: PublishedRun) -> MemoryCase:
    """Compare one run."""
    fit = fits(published.run, published.cluster)
    predicted, measured = fit.predicted_gib, None
    if not published.is_out_of_memory:
        memory = rank_memory(published.run, published.cluster, _measured_stage(published))
        if published.memory_gib is not None:
            is_reserved = "reserved" in published.memory_kind
            predicted = (memory.reserved if is_reserved else memory.allocated) / GIB
            measured = published.memory_gib
        elif published.memory_gb is not None:
            predicted, measured = memory.reserved_or_smi / GIB, published.memory_gb
    return MemoryCase(
        id=published.id,
        predicted=predicted,
        measured=measured,
        ran=not published.is_out_of_memory,
        said_to_fit=fit.is_possible,
    )


def _measured_stage(published: PublishedRun) -> int:
    """The pipeline stage whose memory was published; where nothing is said, the fullest."""
    if "last rank" in published.memory_kind:
        return published.run.pp - 1
    if "nvidia-smi" in published.memory_kind:
        return 0  # of the first node
    return worst_stage(published.run, published.cluster).stage


def _errors(name: str, cases: Sequence[MemoryCase]) -> SetErrors:
    measured = [case for case in cases if case.measured is not None]
    ran = [case for case in cases if case.ran]
    failed = [case for case in cases if not case.ran]
    worst = max(measured, key=lambda case: abs(case.error), default=None)
    return SetErrors(
        set=name,
        n=len(measured),
        is_fitted=name in fitted_sets(),
        median=statistics.median(abs(case.error) for case in measured) if measured else None,
        worst=worst.error if worst else None,
        worst_id=worst.id if worst else "",
        bias=statistics.mean(case.error for case in measured) if measured else None,
        out_of_memory=len(failed),
        out_of_memory_found=sum(not case.said_to_fit for case in failed),
        ran=len(ran),
        wrongly_impossible=tuple(case.id for case in ran if not case.said_to_fit),
    )


def render(errors: Sequence[SetErrors]) -> str:
    """Return a Markdown table."""
    rows = [
        "| set | runs | | median error | worst | bias | out of memory, found"
        " | ran, but said not to fit |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for e in errors:
        rows.append(
            f"| {e.set} | {e.n} | {_role(e)} | {_per_cent(e.median)}"
            f" | {_per_cent(e.worst, '+')} | {_per_cent(e.bias, '+')}"
            f" | {e.out_of_memory_found} of {e.out_of_memory}"
            f" | {len(e.wrongly_impossible)} of {e.ran} |"
        )
    return "\n".join(rows) + "\n"


def _role(e: SetErrors) -> str:
    return "fitted" if e.is_fitted else "held out"


def _per_cent(share: float | None, sign: str = "") -> str:
    return "" if share is None else f"{100 * share:{sign}.1f} %"
