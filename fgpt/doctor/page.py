"""The doctor's page: one line for each check, its remedy below."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from fgpt.doctor.check import GRADES, Check, Grade, worst
from fgpt.errors import printable

STYLES: Mapping[Grade, str] = {"ok": "green", "slow": "yellow", "warning": "yellow", "error": "red"}


def render(checks: Sequence[Check], n_ranks: int, console: Console) -> None:
    """Print the page."""
    width = max(map(len, GRADES))
    for check in checks:
        line = Text(f"{check.grade:<{width}} ", style=STYLES[check.grade])
        line.append(printable(f" {check.what}: {check.value}"), style="default")
        console.print(line, soft_wrap=True)
        if check.remedy:
            console.print(Text(printable(f"{'':{width}}    -> {check.remedy}")), soft_wrap=True)
    console.print(Text(summary(checks, n_ranks)), soft_wrap=True)


def summary(checks: Sequence[Check], n_ranks: int) -> str:
    """The last line."""
    counts = Counter(check.grade for check in checks)
    texts = (f"{counts[grade]} {grade}" for grade in GRADES if counts[grade])
    return f"{n_ranks} rank{'s' * (n_ranks > 1)}: {', '.join(texts)}"


def as_json(checks: Sequence[Check], n_ranks: int) -> dict[str, Any]:
    """The page as JSON values."""
    return {
        "ranks": n_ranks,
        "grade": worst(checks),
        "checks": [asdict(check) for check in checks],
    }
