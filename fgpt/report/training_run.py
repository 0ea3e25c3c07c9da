"""The loss curves and the summary of a training run, from its files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fgpt.report.run_record import Curves
from fgpt.utils.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_loss(curves: Curves, path: Path, title: str) -> None:
    """Plot training and validation loss against the step, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw_loss(axes, curves, title)
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    write_atomic(path, image.getvalue())


def draw_loss(axes: Axes, curves: Curves, title: str) -> None:
    """Draw the training losses, then the validation losses, into empty axes."""
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
