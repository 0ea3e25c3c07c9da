"""One line of the doctor's page, and how the lines of many ranks become few."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Grade = Literal["ok", "slow", "warning", "error"]
GRADES: tuple[Grade, ...] = ("ok", "slow", "warning", "error")
"""From good to bad. slow: works, below the speed of its kind. warning: may cost a run later or
makes it slower. error: a run would fail or compute something else."""
SLOW_RATIO = 0.8
"""A device or group below this fraction of its kind's median is slow."""


@dataclass(frozen=True)
class Check:
    """One finding."""

    grade: Grade
    """How bad it is."""
    what: str
    """What was examined: `free disk`."""
    value: str
    """What was found, with its unit and the place, if it is not everywhere."""
    remedy: str = ""
    """What to do; empty if nothing."""

    def __str__(self) -> str:
        return f"{self.what}: {self.value}" + (f" -> {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Places:
    """The node of each rank, for messages."""

    nodes: tuple[str, ...]
    """Name of each rank's node."""

    @property
    def distinct(self) -> list[str]:
        """The names of the nodes, in the order of their lowest ranks."""
        return list(dict.fromkeys(self.nodes))

    def describe(self, ranks: Iterable[int]) -> str:
        """`rank 3`, `ranks 0-3`; with several nodes `ranks 0-3 on a, 4 on b`."""
        ranks = sorted(ranks)
        noun = "rank" if len(ranks) == 1 else "ranks"
        if len(self.distinct) == 1:
            return f"{noun} {spans(ranks)}"
        texts = []
        for node in self.distinct:
            here = [rank for rank in ranks if self.nodes[rank] == node]
            if here:
                texts.append(f"{spans(here)} on {node}")
        return f"{noun} {', '.join(texts)}"


def spans(numbers: Sequence[int]) -> str:
    """`0-3, 8` of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def merge(checks_by_rank: Sequence[Sequence[Check]], places: Places) -> list[Check]:
    """One line for equal findings of several ranks, with the ranks if they are not all.

    Of all ranks for which something is ok, the lowest one's value is shown.
    """
    ranks_by_check: dict[Check, list[int]] = {}
    for rank, checks in enumerate(checks_by_rank):
        for check in checks:
            ranks_by_check.setdefault(check, []).append(rank)
    merged: dict[str, list[Check]] = {}
    for check, ranks in ranks_by_check.items():
        lines = merged.setdefault(check.what, [])
        if check.grade == "ok":
            if not any(line.grade == "ok" for line in lines):
                lines.append(check)
        elif len(ranks) == len(checks_by_rank):
            lines.append(check)
        else:
            lines.append(replace(check, value=f"{check.value} ({places.describe(ranks)})"))
    return [line for lines in merged.values() for line in lines]


def worst(checks: Sequence[Check]) -> Grade:
    """The worst grade; ok without any check."""
    return max((check.grade for check in checks), key=GRADES.index, default="ok")


def size_text(n_bytes: float) -> str:
    """`1.5 GiB`, `64 MiB`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes / 1024:.3g} KiB"


def speed_text(per_second: float, unit: str) -> str:
    """`45 GFLOP/s`, `1.2 TFLOP/s`, `830 MB/s`, with three digits; `unit`: FLOP or B."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if per_second >= size:
            return f"{per_second / size:.3g} {prefix}{unit}/s"
    return f"{per_second / 1e3:.3g} k{unit}/s"
