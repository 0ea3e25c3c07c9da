"""The page of `fgpt plan`: stacked bars of memory and time, and the table of layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fgpt.plan.budget import Budget
from fgpt.plan.present import (
    GIB,
    budget_lines,
    candidate_cells,
    describe,
    fit_line,
    heading_lines,
    speed_lines,
)
from fgpt.plan.search import Candidate
from fgpt.report.document import ReportPart, to_html
from fgpt.report.plots import BAR_INCHES, Picture, empty_figure, png, slug
from fgpt.report.tables import Table, TableRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "FGPT: plan"
Terms = Mapping[str, float]


def plan_page(candidates: Sequence[Candidate], budget: Budget | None) -> str:
    """Return the HTML page of a plan, the first candidate; the others are for comparison."""
    first = candidates[0]
    texts = [*heading_lines(first), fit_line(first), *speed_lines(first)]
    texts += [] if budget is None else budget_lines(first, budget)
    parts = [ReportPart("The plan", texts, pictures=[plan_picture(candidates)])]
    if len(candidates) > 1:
        parts.append(ReportPart("Layouts that fit", tables=[_table(candidates)]))
    return to_html(parts, TITLE)


def plan_picture(candidates: Sequence[Candidate]) -> Picture:
    """Return stacked bars of each layout's memory and time by term, the first one on top."""
    figure = empty_figure(13, 3.2 + BAR_INCHES * len(candidates))
    memory, time = figure.subplots(1, 2, sharey=True)
    names = [describe(candidate) for candidate in candidates]
    in_gib = [{n: v / GIB for n, v in c.memory.terms().items()} for c in candidates]
    _draw_stacks(memory, in_gib, "GiB of the rank that needs most")
    memory.axvline(candidates[0].cluster.device.memory_gib, color="#c8452d", linestyle="--")
    _draw_stacks(time, [c.time.terms() for c in candidates], "seconds of a step")
    memory.set_yticks(range(len(names)), names)
    memory.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    title = f"{candidates[0].run.model.preset} on {candidates[0].cluster.gpus:,} GPUs"
    alt = f"{title}: bars of memory and time by term. {fit_line(candidates[0])}"
    return Picture(f"plan-{slug(title)}.png", alt, png(figure))


def _draw_stacks(axes: Axes, bars: Sequence[Terms], label: str) -> None:
    """One bar for each list of terms; terms that are 0 in all have no colour."""
    from matplotlib import colormaps

    every = dict.fromkeys(name for bar in bars for name in bar)
    names = [name for name in every if any(bar.get(name, 0) > 0 for bar in bars)]
    colours = [colormaps["tab20"](number) for number in range(20)]
    lefts = [0.0] * len(bars)
    for number, name in enumerate(names):
        values = [bar.get(name, 0) for bar in bars]
        colour = colours[number % len(colours)]
        axes.barh(range(len(bars)), values, left=lefts, color=colour, label=name.replace("_", " "))
        lefts = [left + value for left, value in zip(lefts, values, strict=True)]
    axes.set_xlabel(label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _table(candidates: Sequence[Candidate]) -> Table:
    headers = list(candidate_cells(candidates[0]))
    rows = [TableRow(list(candidate_cells(c).values()), "") for c in candidates]
    return Table("the fastest first", headers, rows, frozenset())
