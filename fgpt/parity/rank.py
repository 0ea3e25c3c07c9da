"""One rank of `fgpt parity`: the oracle on rank 0, then every layout on all ranks."""

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
from fgpt.distributed.launch import World
from fgpt.distributed.local_ranks import joined_ranks
from fgpt.distributed.peers import watch_peers
from fgpt.distributed.traffic import KINDS
from fgpt.engine.build import build_engine
from fgpt.engine.deepspeed.zero_engine import ZeroEngine
from fgpt.parallel.topology import Grid, count_traffic
from fgpt.parity.layouts import ComparedRun, Layout
from fgpt.parity.trace import BOUNDS, Trace, Verdict, compare, trace
from fgpt.plan.traffic import sent_bytes

_LEGEND = (
    "sent: by the rank that sends most, in the second step; ?: no formula of"
    " fgpt/parallel/README.md gives this number"
)


@dataclass(frozen=True)
class LayoutResult:
    """One layout's line in the table and record in the file."""

    layout: str
    grid: str
    verdict: Verdict
    seconds: float
    """Duration, building the engine included."""
    sent_bytes: dict[str, int]
    """Kind of group -> bytes sent in one step, measured; maximum over the ranks."""
    predicted_bytes: dict[str, int]
    """The same by the formulas of fgpt/parallel/README.md, where one exists."""


def compare_all(
    layouts: Sequence[tuple[Layout, Resolved]],
    compared_run: ComparedRun,
    world: World,
    out: Path | None,
) -> int:
    """Compare every layout with the oracle; returns 0 if all train the same run, else 1."""
    with joined_ranks(world) as device, watch_peers(world, device):
        return _compare_all(layouts, compared_run, world, device, out)


def _compare_all(
    layouts: Sequence[tuple[Layout, Resolved]],
    compared_run: ComparedRun,
    world: World,
    device: torch.device,
    out: Path | None,
) -> int:
    console = Console(quiet=not world.is_rank0, width=None if os.isatty(1) else 160)
    # 1. the oracle, on rank 0 alone
    reference = compared_run.oracle()
    oracle = Trace()
    if world.is_rank0:
        engine = build_engine(reference, World(), device)
        oracle = trace(engine, reference, compared_run.steps)
        engine.close()
    _print_header(console, compared_run, reference, device)
    # 2. every layout, on all ranks
    results = []
    for layout, resolved in layouts:
        results.append(_compare_layout(layout, resolved, compared_run.steps, world, device, oracle))
        departs = results[-1].verdict.departs
        state = "same" if departs is None else f"DEPARTS: {departs}"
        line = f"{layout.name:<20} {state}  ({results[-1].seconds:.1f} s)"
        console.print(line, highlight=False, markup=False)
    # 3. the table and the records
    console.print(_table(results), _LEGEND, highlight=False)
    if out is not None and world.is_rank0:
        machine = environment(device)
        for result in results:
            append(out, {**machine, **asdict(result)})
    departed = [result for result in results if result.verdict.departs is not None]
    if not departed:
        console.print(
            f"{len(results)} layout{'s' * (len(results) > 1)}: the same run", highlight=False
        )
        return 0
    console.print(f"{len(departed)} of {len(results)} layouts depart:", highlight=False)
    for result in departed:
        line = f"  {result.layout}: {result.verdict.departs}"
        console.print(line, highlight=False, markup=False)
    return 1


def _compare_layout(
    layout: Layout,
    resolved: Resolved,
    steps: int,
    world: World,
    device: torch.device,
    oracle: Trace,
) -> LayoutResult:
    t0 = time.perf_counter()
    engine = build_engine(resolved, world, device)
    assert isinstance(engine, ZeroEngine)  # only the oracle is not DeepSpeed's
    traffic = count_traffic(engine.groups)
    bounds = BOUNDS[resolved.precision]
    verdict = compare(engine, resolved, world.rank, steps, oracle, bounds, traffic)
    engine.close()
    del engine
    gc.collect()  # DeepSpeed's objects form cycles, which keep process groups alive
    grid = Grid.of(resolved.batch)
    measured = gather_json(dict(traffic.bytes), device)
    predicted = [sent_bytes(resolved, grid.coordinates(rank)) for rank in range(world.size)]
    if steps < 2:
        measured = predicted = []  # the second step is the one that is counted
    return LayoutResult(
        layout.name,
        resolved.batch.grid,
        verdict,
        time.perf_counter() - t0,
        _max_over_ranks(measured),
        _max_over_ranks(predicted),
    )


def _max_over_ranks(ranks: Sequence[dict[str, int]]) -> dict[str, int]:
    return {kind: max(rank.get(kind, 0) for rank in ranks) for kind in dict.fromkeys(chain(*ranks))}


def _print_header(
    console: Console, compared_run: ComparedRun, reference: Resolved, device: torch.device
) -> None:
    run, batch, bounds = reference.run, reference.batch, BOUNDS[reference.precision]
    console.print(
        f"{run.model.preset}, {reference.precision}: {compared_run.steps} steps of"
        f" {batch.global_size} samples x {run.data.seq_len} tokens, {compared_run.world} ranks on"
        f" {device.type}, clipping at {reference.deepspeed['gradient_clipping']:g}\n"
        f"against one process without DeepSpeed; bounds, relative: loss {bounds.loss:.0e}, gradient"
        f" norm {bounds.norm:.0e}, a parameter's gradient {bounds.gradient:.0e}",
        highlight=False,
    )


def _table(results: Sequence[LayoutResult]) -> Table:
    table = Table(title="largest relative difference", title_justify="left")
    for column in ("layout", "loss", "norm", "gradient", "of", "", "MB sent per step"):
        table.add_column(column, overflow="fold")
    for result in results:
        verdict = result.verdict
        numbers = (f"{x:.1e}" for x in (verdict.loss, verdict.norm, verdict.gradient))
        state = "same" if verdict.departs is None else "DEPARTS"
        table.add_row(result.layout, *numbers, verdict.where, state, _sent_cell(result))
    return table


def _sent_cell(result: LayoutResult) -> str:
    """Return the MB sent by kind of group, with "?" where no formula gives the number."""
    measured, predicted = result.sent_bytes, result.predicted_bytes
    return ", ".join(
        f"{kind} {measured.get(kind, 0) / 1e6:.3g}"
        + ("" if measured.get(kind, 0) == predicted.get(kind) else "?")
        for kind in KINDS
        if measured.get(kind) or predicted.get(kind)
    )
