"""The training curves of a run, from its metrics file alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Curves:
    """What metrics.jsonl holds, as columns."""

    steps: list[int]
    """Training steps taken, without skipped ones."""
    losses: list[float]
    """Training loss of each, in nats per token."""
    valid_steps: list[int]
    """Steps at which the validation loss was measured."""
    valid_losses: list[float]
    """Those losses, in nats per token."""
    all_steps: int
    """Number of training steps, skipped ones included."""
    seconds: float
    """Time of all of them together."""


def read_curves(metrics: Path) -> Curves:
    """Read a metrics file; a torn last line (a killed run) is left out."""
    train: list[tuple[int, float]] = []
    valid: list[tuple[int, float]] = []
    all_steps, seconds = 0, 0.0
    for line in metrics.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if "valid_loss" in record:
            valid.append((record["step"], record["valid_loss"]))
            continue
        all_steps += 1
        seconds += record["step_s"]
        if not record["skipped"]:
            train.append((record["step"], record["loss"]))
    return Curves(
        steps=[step for step, _ in train],
        losses=[loss for _, loss in train],
        valid_steps=[step for step, _ in valid],
        valid_losses=[loss for _, loss in valid],
        all_steps=all_steps,
        seconds=seconds,
    )


def plot_loss(curves: Curves, path: Path, title: str) -> None:
    """Draw training and validation loss against the step, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(curves.steps, curves.losses, color="#9db8d9", linewidth=1, label="training")
    axes.plot(
        curves.valid_steps,
        curves.valid_losses,
        color="#c8452d",
        linewidth=2,
        marker="o",
        markersize=4,
        label="validation",
    )
    if curves.valid_losses:
        axes.annotate(
            f"{curves.valid_losses[-1]:.3f}",
            (curves.valid_steps[-1], curves.valid_losses[-1]),
            textcoords="offset points",
            xytext=(0, 8),
            ha="right",
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
