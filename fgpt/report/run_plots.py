"""A run's loss curve as an animation that draws itself, and as text for a terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from fgpt.report.run_record import RunRecord
from fgpt.report.training_run import draw_loss

FRAMES = 48
FRAME_MS, LAST_FRAME_MS = 70, 4000
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a Braille character (U+2800 + bits): 4 rows of 2."""


def curve_gif(run: RunRecord) -> bytes:
    """Return curve.gif: the losses appear step by step, on axes of the whole run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    # 1. the whole curve sets the axes; each frame shows a part of it
    figure = Figure(figsize=(8, 4.5), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves = run.records.curves()
    draw_loss(axes, curves, f"{run.model}: {run.name}")
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    for text in axes.texts:
        text.set_visible(False)  # the last loss, until the last frame
    canvas.draw()
    figure.set_layout_engine("none")
    last = max([*curves.steps, *curves.valid_steps], default=0)
    frames = []
    for i in range(1, FRAMES + 1):
        end = last * i / FRAMES
        parts = [(curves.steps, curves.losses), (curves.valid_steps, curves.valid_losses)]
        for line, (steps, losses) in zip(axes.lines, parts, strict=True):
            n = sum(step <= end for step in steps)
            line.set_data(steps[:n], losses[:n])
        if i == FRAMES:
            for text in axes.texts:
                text.set_visible(True)
        canvas.draw()
        size = canvas.get_width_height()
        frames.append(Image.frombytes("RGBA", size, bytes(canvas.buffer_rgba())).convert("RGB"))
    # 2. one palette for all frames, so that the background does not flicker
    palette = frames[-1].quantize(64)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    output = io.BytesIO()
    durations = [FRAME_MS] * (FRAMES - 1) + [LAST_FRAME_MS]
    frames[0].save(
        output, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )
    return output.getvalue()


def terminal_plot(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]], width: int, height: int
) -> list[list[int]]:
    """Draw lines of (x, y) with Braille dots, each point joined to the next.

    Returns for each of `height` rows and `width` columns 0, or the dots of the cell in the bits
    0-7 and the number of the last line through it, from 1 on, in the bits above.
    """
    cells = [[0] * width for _ in range(height)]
    points = [point for xs, ys in curves for point in zip(xs, ys, strict=True)]
    if not points:
        return cells
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    for number, (xs, ys) in enumerate(curves, 1):
        places = [
            (
                (x - left) / ((right - left) or 1) * (2 * width - 1),
                (high - y) / ((high - low) or 1) * (4 * height - 1),
            )
            for x, y in zip(xs, ys, strict=True)
        ]
        for (x0, y0), (x1, y1) in zip(places, places[1:] or places, strict=False):
            n = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0))))
            for i in range(n + 1):
                column, row = round(x0 + (x1 - x0) * i / n), round(y0 + (y1 - y0) * i / n)
                dots = cells[row // 4][column // 2] & 0xFF
                cells[row // 4][column // 2] = dots | DOTS[row % 4][column % 2] | number << 8
    return cells
