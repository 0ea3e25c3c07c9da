"""Records as a table on the console."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("env_name", "ranks", "train SPS", "x ref", "predict SPS", "x ref", "GB", "loss")


def show(console: Console, records: Sequence[dict[str, Any]]) -> None:
    """A table for each row and section, in the records' order."""
    for row, section in dict.fromkeys((r["row"], r["section"]) for r in records):
        mine = [r for r in records if (r["row"], r["section"]) == (row, section)]
        measured = [r for r in mine if r["state"] in ("measured", "wrong")]
        parameters = mine[0]["parameters"]
        table = Table(
            title=f"{row} ({parameters / 1e9:.3f} B parameters), {section}; x: against"
            f" {mine[0]['reference']}",
            title_justify="left",
        )
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in ("env_name", "loss") else "right")
        for one in measured:
            table.add_row(*_cells(one))
        console.print(table)
        for one in mine:
            if one not in measured:
                console.print(f"  {one['env_name']}: {one['state']}: {one['why']}", highlight=False)


def _cells(one: dict[str, Any]) -> list[str]:
    ratio = one["ratio"] or {}
    loss = f"{one['losses'][-1]:.4f}" + ("  WRONG" if one["state"] == "wrong" else "")
    cells = [one["env_name"], str(one["ranks"])]
    for kind in ("train", "predict"):
        cells.append(f"{samples_per_s(one, kind):,.1f}")
        cells.append("" if kind not in ratio else "{:.2f} ({:.2f}-{:.2f})".format(*ratio[kind]))
    return [*cells, f"{one['memory']['peak_bytes'] / 1e9:.2f}", loss]


def samples_per_s(one: Mapping[str, Any], kind: str) -> float:
    """Median over the rounds."""
    return one["global_batch"] * one[kind]["batches"] / statistics.median(one[kind]["round_s"])
