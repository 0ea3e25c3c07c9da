"""One bench on one machine: speed against the reference, a line for each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fgpt.report.canvas import GREY, WRONG, Picture, empty_figure, line_style, png_of, slug
from fgpt.report.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]


def ladder_lines(records: Sequence[Record]) -> Picture | None:
    """Training speed, times the reference, over the ladder's rungs; None if there is none.

    `records`: of the single bench on one machine.
    """
    ladder = [record for record in records if record.section == "ladder"]
    compared = [record for record in ladder if _ratio(record)]
    if not compared:
        return None
    rungs = dict.fromkeys(r.env_name for r in sorted(ladder, key=lambda r: r.order[1]))
    place = {rung: float(i) for i, rung in enumerate(rungs)}
    figure = empty_figure(10, 5.2)
    axes = figure.add_subplot()
    lines: dict[str, list[Point]] = {}
    wrong: list[Point] = []
    for record in compared:
        point = place[record.env_name], _ratio(record)
        (wrong if record.state == "wrong" else lines.setdefault(record.row, [])).append(point)
    for i, (row, points) in enumerate(lines.items()):
        axes.plot(*_columns(points), label=row, **line_style(i))
    if wrong:
        axes.plot(*_columns(wrong), "x", color=WRONG, markersize=10, label="WRONG losses")
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set_xticks(range(len(place)), list(place), rotation=35, ha="right")
    axes.set_xlim(-0.3, len(place) - 0.7)
    title = f"single: times {ladder[0].reference}, rung by rung, {ladder[0].hardware}"
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rung: each adds one thing to the one before")
    _finish(axes, f"training speed, times {ladder[0].reference}")
    best = "; ".join(
        f"{row} up to {max(y for _, y in points):.2f}" for row, points in lines.items()
    )
    return Picture(
        f"{slug(f'single times {ladder[0].hardware}')}.png",
        f"{title}: lines of training speed. {best}.",
        png_of(figure),
    )


def scaling_lines(records: Sequence[Record]) -> Picture | None:
    """Strong and weak scaling over ranks against the ideal; None if nothing was scaled.

    `records`: of the multi bench on one machine.
    """
    scaled = [r for r in records if r.section in ("strong", "weak") and _ratio(r)]
    if not scaled:
        return None
    hardware, on_gpu = scaled[0].hardware, scaled[0].on_gpu
    figure = empty_figure(11, 4.8)
    both = figure.subplots(1, 2, sharey=True)
    words = []
    for axes, section in zip(both, ("strong", "weak"), strict=True):
        lines = _over_ranks([record for record in scaled if record.section == section])
        ticks = sorted({1.0} | {x for points in lines.values() for x, _ in points})
        what = "N times one" if on_gpu else "one process that uses all cores"
        ideal = ticks if on_gpu else [1.0] * len(ticks)
        axes.plot(ticks, ideal, "--", color=GREY, label=f"ideal: {what}")
        for i, (row, points) in enumerate(lines.items()):
            axes.plot(*_columns(points), label=row, **line_style(i))
            words += [f"{section}, {row}, {x:.0f} ranks: {y:.2f}" for x, y in points if x > 1]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:.0f}" for x in ticks])
        axes.set_xlabel("ranks")
        axes.set_title(f"{section} scaling")
        if on_gpu:  # the ideal is a straight line
            axes.set_yscale("log", base=2)
            axes.set_yticks(ticks, [f"{x:.0f}" for x in ticks])
        else:
            axes.set_ylim(0, 1.15 * max(1.0, *map(_ratio, scaled)))
        axes.minorticks_off()
        _finish(axes, "training samples/s, times 1 rank" if section == "strong" else "")
    title = f"multi: {hardware}"
    figure.suptitle(title)
    return Picture(
        f"{slug(f'multi scaling {hardware}')}.png",
        f"{title}: training samples/s, times 1 rank. {'; '.join(words)}.",
        png_of(figure),
    )


def _over_ranks(records: Sequence[Record]) -> dict[str, list[Point]]:
    """By row: (ranks, times 1 rank); strong scaling begins at the reference itself."""
    lines: dict[str, list[Point]] = {}
    for record in records:
        if record.figures and record.state == "measured":
            start = [(1.0, 1.0)] if record.section == "strong" else []
            points = lines.setdefault(record.row, start)
            points.append((float(record.figures.ranks), _ratio(record)))
    return {row: sorted(points) for row, points in lines.items()}


def _ratio(record: Record) -> float:
    """Median of the training speed, times the reference's; 0: not compared."""
    figures = record.figures
    return figures.train_ratio[0] if figures and figures.train_ratio else 0.0


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _finish(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
