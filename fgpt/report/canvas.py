"""What the report's pictures have in common: PNGs in memory, colours, names."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# told apart by readers who do not tell red from green, too; darker and lighter ones in turn
COLOURS = ("#2f5f98", "#e08a2e", "#3f8f6b", "#c79bd6", "#7a3b69", "#6fb1c9", "#5f5f5f", "#b59a2a")
MARKERS = "os^Dv<>P"
WRONG = "#c8452d"
GREY = "#888888"


class Picture(NamedTuple):
    """A PNG, and what it shows in words."""

    name: str
    """File name."""
    alt: str
    png: bytes


def slug(text: str) -> str:
    """A text as part of a file name: `AMD EPYC, 2 cores` -> `amd-epyc-2-cores`."""
    letters = (letter if letter.isascii() and letter.isalnum() else " " for letter in text.lower())
    return "-".join("".join(letters).split())


def empty_figure(width: float, height: float) -> Figure:
    """In inches; independent of any window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Figure) -> bytes:
    """The figure's picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def line_style(i: int) -> dict[str, Any]:
    """Of the i-th line: colour, and a marker that does without it."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linewidth": 2,
        "markersize": 6,
    }
