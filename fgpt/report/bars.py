"""One row of a bench on one machine: speed and memory of every rung, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fgpt.report.canvas import COLOURS, WRONG, Picture, empty_figure, png_of, slug
from fgpt.report.cells import GIB, name, number
from fgpt.report.records import Figures, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES_A_BAR = 0.32


def bars(records: Sequence[Record]) -> Picture:
    """Training samples/s and peak memory of every rung, from the first to the last.

    `records`: of one row on one machine; those not measured are named.
    """
    first = records[0]
    figure = empty_figure(11, 1.7 + INCHES_A_BAR * len(records))
    speed, memory = figure.subplots(1, 2, sharey=True)
    colours = dict(zip(dict.fromkeys(r.section for r in records), COLOURS, strict=False))
    for place, record in enumerate(records):
        if record.figures is None:
            for axes in (speed, memory):
                axes.text(0, place, f" {record.state}", va="center", color=WRONG, fontsize=9)
            continue
        colour = WRONG if record.state == "wrong" else colours[record.section]
        _bar(speed, place, record.figures.train.samples_per_s, colour, _spread(record.figures))
        _bar(memory, place, record.figures.memory_bytes / GIB, colour)
    speed.set_yticks(range(len(records)), [name(record) for record in records])
    speed.set_ylim(len(records) - 0.4, -0.6)  # the first on top
    _finish(speed, "training, samples/s (thin line: slowest to fastest round)")
    of_rank = " of one rank" if first.bench == "multi" else ""
    _finish(memory, f"peak memory{of_rank}, GB (2^30 bytes)")
    _legend(figure, colours)
    title = f"{first.bench}: {first.row}, {first.hardware}"
    figure.suptitle(title)
    return Picture(
        f"{slug(f'{first.bench} {first.row} {first.hardware}')}.png",
        f"{title}: bars of training samples/s and peak memory. {_in_words(records)}",
        png_of(figure),
    )


def _spread(figures: Figures) -> tuple[float, float]:
    """Samples/s of the slowest and of the fastest round."""
    train = figures.train
    return train.samples / max(train.round_s), train.samples / min(train.round_s)


def _bar(
    axes: Axes, place: int, value: float, colour: str, spread: tuple[float, float] | None = None
) -> None:
    axes.barh(place, value, color=colour, height=0.7)
    low, high = spread or (value, value)
    if spread:
        axes.plot([low, high], [place, place], color="#111111", linewidth=1.2)
    axes.annotate(
        number(value),
        (max(high, value), place),
        textcoords="offset points",
        xytext=(4, 0),
        va="center",
        fontsize=9,
    )


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.margins(x=0.18)  # for the figures behind the bars
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    if len(colours) > 1:
        handles = [Patch(color=colour, label=section) for section, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _in_words(records: Sequence[Record]) -> str:
    measured = [(record, record.figures) for record in records if record.figures]
    if not measured:
        return "Nothing was measured."
    fastest, speed = max(measured, key=lambda pair: pair[1].train.samples_per_s)
    smallest, memory = min(measured, key=lambda pair: pair[1].memory_bytes)
    return (
        f"Fastest: {name(fastest)}, {number(speed.train.samples_per_s)} samples/s. Least memory:"
        f" {name(smallest)}, {number(memory.memory_bytes / GIB)} GB."
    )
