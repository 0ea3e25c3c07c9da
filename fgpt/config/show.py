"""Prints a resolved configuration: batch, values with their origins, and DeepSpeed's changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fgpt.config.resolve import Resolved
from fgpt.config.run_file import to_dict
from fgpt.utils.keys import shown


def render(resolved: Resolved, console: Console) -> None:
    """Print the configuration as `fgpt check` does."""
    zero = f"ZeRO-{resolved.zero_stage}"
    engine = "plain engine" if resolved.run.train.engine == "plain" else f"DeepSpeed {zero}"
    console.print(f"[bold]{engine}, {resolved.precision}, {resolved.device}[/bold]")
    console.print(Text(resolved.batch.explain()))
    tokens = resolved.batch.global_size * resolved.seq_len
    steps = resolved.run.train.steps
    console.print(
        f"{tokens} tokens per step = global batch {resolved.batch.global_size} x seq_len "
        f"{resolved.seq_len}; {tokens * steps} in {steps} steps"
    )
    console.print(_table("run file", "run", to_dict(resolved.run), resolved.origins))
    console.print(_table("DeepSpeed JSON", "deepspeed", resolved.deepspeed, resolved.origins))
    if resolved.engine_changes:
        console.print(_changes(resolved))
    console.print(f"fingerprint {resolved.fingerprint()}")


def _table(title: str, root: str, values: Mapping[str, Any], origins: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("key", "value", "origin"):
        table.add_column(column, overflow="fold")
    for path, value in _leaves(values):
        origin = origins.get(f"{root}.{path}", "default")
        style = "dim" if origin == "default" else ""
        table.add_row(*(Text(cell) for cell in (path, shown(value), origin)), style=style)
    return table


def _changes(resolved: Resolved) -> Table:
    title = "changed for DeepSpeed"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("key", "value", "for DeepSpeed", "reason"):
        table.add_column(column, overflow="fold")
    for key, user, engine, reason in resolved.engine_changes:
        cells = ("absent" if value is None else shown(value) for value in (user, engine))
        table.add_row(*(Text(cell) for cell in (key, *cells, reason)))
    return table


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        inner = f"{path}.{name}" if path else name
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, inner)
        else:
            yield inner, value
