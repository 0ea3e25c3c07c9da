"""`fgpt parity --measure`: peak memory and step time of each layout, beside what is predicted."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fgpt.bench.record import append, environment
from fgpt.config.resolve import Resolved
from fgpt.distributed.agreements import gather_json
from fgpt.distributed.launch import World
from fgpt.distributed.local_ranks import joined_ranks
from fgpt.distributed.peers import watch_peers
from fgpt.engine.build import build_engine
from fgpt.parallel.topology import Grid
from fgpt.parity.layouts import Layout
from fgpt.parity.trace import micro_batches
from fgpt.plan.cluster import Cluster, find_device
from fgpt.plan.footprint import rank_memory
from fgpt.plan.planned_run import planned_run

MIB = 2**20
ANY_CLUSTER = Cluster(find_device("h100-80g"), 8, 8, 1.0)
"""The cluster decides only what torch does not allocate."""
STEPS_OF_PEAK = 3
"""The second one is the first with all optimizer states."""


@dataclass
class Peak:
    """Most bytes that torch had allocated at a time since the measurement began."""

    bytes: int = 0


@dataclass(frozen=True)
class MeasuredLayout:
    """One layout's line in the table and record in the file. Bytes are of one rank."""

    layout: str
    grid: str
    measured_bytes: list[int]
    """Peak of the first rank of each pipeline stage."""
    predicted_bytes: list[int]
    """The same, by `fgpt.plan.footprint`."""
    step_s: list[float]
    """Of each timed step, the slowest rank's."""
    terms: list[dict[str, int]] = field(default_factory=list)
    """Of the prediction, by stage."""

    @property
    def memory_error(self) -> float:
        """The largest of the stages, relative, with its sign."""
        errors = [
            predicted / measured - 1
            for predicted, measured in zip(self.predicted_bytes, self.measured_bytes, strict=True)
        ]
        return max(errors, key=abs)


@contextmanager
def peak_allocation(device: torch.device) -> Iterator[Peak]:
    """Measure what torch allocates on the device; on a CPU by its profiler's allocation events."""
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    profiler = torch.autograd.profiler.profile(use_cpu=True, profile_memory=True)
    with profiler:
        yield peak
    results = profiler.kineto_results
    assert results is not None  # the profiler has stopped
    changes = [event for event in results.events() if event.name() == "[memory]"]
    total = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        total += int(change.nbytes())  # type: ignore[attr-defined]  # not in torch's stubs
        peak.bytes = max(peak.bytes, total)


def measure_all(
    layouts: Sequence[tuple[Layout, Resolved]], steps: int, world: World, out: Path | None
) -> int:
    """Measure every layout and print the table."""
    with joined_ranks(world) as device, watch_peers(world, device):
        console = Console(quiet=not world.is_rank0, width=None if os.isatty(1) else 160)
        results = []
        for layout, resolved in layouts:
            results.append(_measure(layout, resolved, steps, world, device))
            line = f"{layout.name:<20} memory {results[-1].memory_error:+.1%}"
            console.print(line, highlight=False, markup=False)
        console.print(_table(results), highlight=False)
        if out is not None and world.is_rank0:
            machine = environment(device)
            for result in results:
                append(out, {**machine, **_as_record(result)})
    return 0


def _measure(
    layout: Layout, resolved: Resolved, steps: int, world: World, device: torch.device
) -> MeasuredLayout:
    batches = [micro_batches(resolved, world.rank, step) for step in range(steps)]
    seconds = []
    with peak_allocation(device) as peak:
        engine = build_engine(resolved, world, device)
        for step in range(STEPS_OF_PEAK):
            engine.train_batch(batches[step % steps]).result()
    for batch in batches:
        start = time.perf_counter()
        engine.train_batch(batch).result()
        seconds.append(time.perf_counter() - start)
    engine.close()
    del engine
    gc.collect()  # DeepSpeed's objects form cycles
    ranks = gather_json([peak.bytes, *seconds], device)
    grid, planned = Grid.of(resolved.batch), planned_run(resolved)
    rows = [rank_memory(planned, ANY_CLUSTER, stage) for stage in range(planned.pp)]
    first_of_stage = [
        next(rank for rank in range(world.size) if grid.coordinates(rank).pipe == row.stage)
        for row in rows
    ]
    return MeasuredLayout(
        layout.name,
        resolved.batch.grid,
        [int(ranks[rank][0]) for rank in first_of_stage],
        [row.allocated - row.workspace for row in rows],
        [max(rank[1 + step] for rank in ranks) for step in range(steps)],
        [row.terms() for row in rows],
    )


def _as_record(result: MeasuredLayout) -> dict[str, Any]:
    return {**vars(result), "memory_error": result.memory_error}


def _table(results: Sequence[MeasuredLayout]) -> Table:
    table = Table(title="peak memory of a rank, by pipeline stage", title_justify="left")
    for column in ("layout", "measured MiB", "predicted MiB", "error", "step s"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for result in results:
        sizes = (result.measured_bytes, result.predicted_bytes)
        cells = [", ".join(f"{size / MIB:.2f}" for size in each) for each in sizes]
        error, step_s = f"{result.memory_error:+.1%}", f"{statistics.median(result.step_s):.3f}"
        table.add_row(result.layout, *cells, error, step_s)
    return table
