"""The loss curves and the summary of a training run, from its files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Curves:
    """The columns of metrics.jsonl; losses in nats per token."""

    steps: list[int]
    """Training steps, without skipped ones."""
    losses: list[float]
    """Training loss of each."""
    valid_steps: list[int]
    """Steps at which the validation loss was measured."""
    valid_losses: list[float]
    """Validation loss of each."""
    all_steps: int
    """Number of training steps, skipped ones included."""
    seconds: float
    """Total time of all steps."""


def read_curves(metrics: Path) -> Curves:
    """Read a metrics file, without the torn last line that a killed run leaves."""
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
    """Plot training and validation loss against the step, as a PNG."""
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


def print_summary(
    console: Console, title: str, rows: dict[str, str], sample: tuple[str, str] | None
) -> None:
    """Print `rows` as a two-column table, and the sample: (prompt, continuation)."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    parts: list[Any] = [table]
    if sample is not None:
        prompt, text = sample
        parts += [Text("\nsample", style="bold"), Text(prompt, style="bold cyan").append(text, "")]
    console.print(Panel(Group(*parts), title=Text(title), expand=False))


def summary_rows(summary: dict[str, Any], run_dir: Path) -> dict[str, str]:
    """Name -> text, from the values of summary.json."""
    rows = {
        "model": f"{summary['model']}, {summary['parameters']:,} parameters",
        "engine": f"{summary['engine']}, {summary['ranks']} rank(s) on {summary['device']}",
        "steps": f"{summary['steps']:,} ({summary['tokens']:,} tokens in this run,"
        f" {summary['skipped_steps']} steps skipped)",
        "training loss": f"{summary['train_loss']:.4f} (last step)",
    }
    if summary["valid_loss"] is not None:
        rows["validation loss"] = (
            f"{summary['valid_loss_first']:.4f} -> {summary['valid_loss']:.4f}"
            f" (fell by {summary['valid_loss_first'] - summary['valid_loss']:.2f} nats)"
        )
    rows |= {
        "speed": f"{summary['tokens_per_s']:,.0f} tokens/s in {summary['train_s']:.0f} s of steps",
        "peak memory": f"{summary['peak_memory_gib']:.2f} GiB (rank 0)",
        "curves": str(run_dir / "loss.png"),
        "checkpoint": summary["checkpoint"] or "none",
    }
    return rows
