"""What one rank of `fgpt parity` does: the oracle on rank 0, then every layout on all of them."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fgpt.bench.record import append, environment
from fgpt.config.resolve import Resolved
from fgpt.distributed.agreements import gather_json
from fgpt.distributed.launch import World, init_process_group, lost_rank, shutdown
from fgpt.distributed.peers import watch_peers
from fgpt.distributed.traffic import KINDS
from fgpt.engine.build import build_engine
from fgpt.engine.deepspeed.zero_engine import ZeroEngine
from fgpt.errors import LostRankError
from fgpt.parallel.topology import Grid, count_traffic
from fgpt.parity.layouts import Layout, Subject
from fgpt.parity.trace import BOUNDS, Trace, Verdict, compare, trace
from fgpt.plan.traffic import sent_bytes
from fgpt.utils.process import exit_with_parent

_LEGEND = (
    "sent: by the rank that sends most, counted in the second step (fgpt/parallel/README.md has the"
    " formulas; ? where none gives that number)"
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    layout: str
    grid: str
    verdict: Verdict
    seconds: float
    """Building the engine and all steps."""
    sent_bytes: dict[str, int]
    """Kind of group -> bytes that a rank sends in one step, counted; the rank that sends most."""
    predicted_bytes: dict[str, int]
    """The same by the formulas of fgpt/parallel/README.md, where there is one."""


def compare_all(
    layouts: Sequence[tuple[Layout, Resolved]], subject: Subject, world: World, out: Path | None
) -> int:
    """Compare every layout with the oracle; 0 if all train the same run, else 1."""
    exit_with_parent(os.environ)
    device = init_process_group(world, os.environ)
    try:
        with watch_peers(world, device):
            return _compare_all(layouts, subject, world, device, out)
    except RuntimeError as error:
        if reason := lost_rank(error):
            raise LostRankError(f"another rank is gone ({reason})") from error
        raise
    finally:
        shutdown()


def _compare_all(
    layouts: Sequence[tuple[Layout, Resolved]],
    subject: Subject,
    world: World,
    device: torch.device,
    out: Path | None,
) -> int:
    console = Console(quiet=not world.is_rank0, width=None if os.isatty(1) else 160)
    alone = subject.oracle()
    oracle = _oracle(subject, alone, device) if world.is_rank0 else Trace()
    _introduce(console, subject, alone, device)
    rows = []
    for layout, resolved in layouts:
        rows.append(_row(layout, resolved, subject.steps, world, device, oracle))
        console.print(_line(rows[-1]), highlight=False, markup=False)
    console.print(_table(rows), _LEGEND, highlight=False)
    if out is not None and world.is_rank0:
        here = environment(device)
        for row in rows:
            append(out, {**here, **asdict(row)})
    departed = [row for row in rows if row.verdict.departs is not None]
    console.print(_sum_up(rows, departed), highlight=False, markup=False)
    return 1 if departed else 0


def _oracle(subject: Subject, resolved: Resolved, device: torch.device) -> Trace:
    """One process, all of its share of the cores."""
    engine = build_engine(resolved, World(), device)
    found = trace(engine, resolved, subject.steps)
    engine.close()
    return found


def _row(
    layout: Layout,
    resolved: Resolved,
    steps: int,
    world: World,
    device: torch.device,
    oracle: Trace,
) -> Row:
    begin = time.perf_counter()
    engine = build_engine(resolved, world, device)
    assert isinstance(engine, ZeroEngine)  # every layout is DeepSpeed's
    traffic = count_traffic(engine.groups)
    bounds = BOUNDS[resolved.precision]
    verdict = compare(engine, resolved, world.rank, steps, oracle, bounds, traffic)
    engine.close()
    del engine
    gc.collect()  # its process groups end with it; DeepSpeed's objects hold one another
    grid = Grid.of(resolved.batch)
    sent = gather_json(dict(traffic.bytes), device)
    predicted = [sent_bytes(resolved, grid.coordinates(rank)) for rank in range(world.size)]
    if steps < 2:
        sent = predicted = []  # there was no step to count
    seconds = time.perf_counter() - begin
    return Row(layout.name, resolved.batch.grid, verdict, seconds, _most(sent), _most(predicted))


def _most(ranks: Sequence[dict[str, int]]) -> dict[str, int]:
    return {kind: max(rank.get(kind, 0) for rank in ranks) for kind in dict.fromkeys(chain(*ranks))}


def _introduce(console: Console, subject: Subject, alone: Resolved, device: torch.device) -> None:
    run, bounds = alone.run, BOUNDS[alone.precision]
    console.print(
        f"{run.model.preset}, {alone.precision}: {subject.steps} steps of {alone.batch.global_size}"
        f" samples x {run.data.seq_len} tokens, {subject.world} ranks on {device.type}, clipping at"
        f" {alone.deepspeed['gradient_clipping']:g}\n"
        f"against one process without DeepSpeed; bounds, relative: loss {bounds.loss:.0e}, gradient"
        f" norm {bounds.norm:.0e}, a parameter's gradient {bounds.gradient:.0e}",
        highlight=False,
    )


def _line(row: Row) -> str:
    verdict = row.verdict
    state = "same" if verdict.departs is None else f"DEPARTS: {verdict.departs}"
    return f"{row.layout:<20} {state}  ({row.seconds:.1f} s)"


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="largest relative difference", title_justify="left")
    for column in ("layout", "loss", "norm", "gradient", "of", "", "MB sent per step"):
        table.add_column(column, overflow="fold")
    for row in rows:
        verdict = row.verdict
        numbers = (f"{x:.1e}" for x in (verdict.loss, verdict.norm, verdict.gradient))
        state = "same" if verdict.departs is None else "DEPARTS"
        table.add_row(row.layout, *numbers, verdict.where, state, _sent(row))
    return table


def _sent(row: Row) -> str:
    """What travels in each kind of group, with a question mark where no formula says as much."""
    counted, predicted = row.sent_bytes, row.predicted_bytes
    return ", ".join(
        f"{kind} {counted.get(kind, 0) / 1e6:.3g}"
        + ("" if counted.get(kind, 0) == predicted.get(kind) else "?")
        for kind in KINDS
        if counted.get(kind) or predicted.get(kind)
    )


def _sum_up(rows: Sequence[Row], departed: Sequence[Row]) -> str:
    if not departed:
        return f"{len(rows)} layout{'s' * (len(rows) > 1)}: the same run"
    lines = [f"  {row.layout}: {row.verdict.departs}" for row in departed]
    return "\n".join([f"{len(departed)} of {len(rows)} layouts depart:", *lines])
