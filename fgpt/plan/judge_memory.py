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
    """None: the run was out of memory."""
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
    wrongly_impossible: tuple[str, ...]
    """Runs that ran, but are said not to fit."""


def judge_memory(runs: Iterable[PublishedRun]) -> list[SetErrors]:
    """Compare predicted with published memory, set by set: rows of quality A and B only."""
    cases: dict[str, list[MemoryCase]] = defaultdict(list)
    for published in runs:
        case = None if published.quality not in ("A", "B") else memory_case(published)
        if case is not None:
            cases[published.set].append(case)
    return [_errors(name, of_set) for name, of_set in sorted(cases.items())]


def memory_case(published: PublishedRun) -> MemoryCase | None:
    """Compare one run; None where no memory was published."""
    run, cluster, kind = published.run, published.cluster, published.memory_kind
    possible = fits(run, cluster).is_possible
    if published.is_out_of_memory:
        return MemoryCase(published.id, fits(run, cluster).predicted_gib, None, possible)
    if published.memory_gib is not None:
        stage = run.pp - 1 if "last rank" in kind else None
        memory = worst_stage(run, cluster) if stage is None else rank_memory(run, cluster, stage)
        size = memory.reserved if "reserved" in kind else memory.allocated
        return MemoryCase(published.id, size / GIB, published.memory_gib, possible)
    if published.memory_gb is not None:
        # nvidia-smi of the node that has the first stage; where nothing is said, of the fullest
        is_first = "nvidia-smi" in kind
        memory = rank_memory(run, cluster, 0) if is_first else worst_stage(run, cluster)
        return MemoryCase(published.id, memory.reserved_or_smi / GIB, published.memory_gb, possible)
    return None


def _errors(name: str, cases: Sequence[MemoryCase]) -> SetErrors:
    ran = [case for case in cases if case.measured is not None]
    failed = [case for case in cases if case.measured is None]
    worst = max(ran, key=lambda case: abs(case.error), default=None)
    return SetErrors(
        set=name,
        n=len(ran),
        is_fitted=name in fitted_sets(),
        median=statistics.median(abs(case.error) for case in ran) if ran else None,
        worst=worst.error if worst else None,
        worst_id=worst.id if worst else "",
        bias=statistics.mean(case.error for case in ran) if ran else None,
        out_of_memory=len(failed),
        out_of_memory_found=sum(not case.said_to_fit for case in failed),
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
            f"| {e.set} | {e.n} | {'fitted' if e.is_fitted else 'held out'} | {_per_cent(e.median)}"
            f" | {_per_cent(e.worst, '+')} | {_per_cent(e.bias, '+')}"
            f" | {e.out_of_memory_found} of {e.out_of_memory} | {len(e.wrongly_impossible)} |"
        )
    return "\n".join(rows) + "\n"


def _per_cent(share: float | None, sign: str = "") -> str:
    return "" if share is None else f"{100 * share:{sign}.1f} %"
