"""One screen at the end of a run: what was trained, how it went, where everything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


def print_summary(
    console: Console, title: str, rows: dict[str, str], sample: tuple[str, str] | None
) -> None:
    """`rows` as a two-column table; `sample` is (prompt, continuation)."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    parts: list[Any] = [table]
    if sample is not None:
        prompt, text = sample
        parts += [Text("\nsample", style="bold"), Text(prompt, style="bold cyan").append(text, "")]
    console.print(Panel(Group(*parts), title=Text(title), expand=False))


def summary_rows(summary: dict[str, Any], run_dir: Path) -> dict[str, str]:
    """The table's lines, out of summary.json's values."""
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
