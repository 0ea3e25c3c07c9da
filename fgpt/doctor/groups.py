"""Speed of the collectives in each process group of a layout."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from fgpt.distributed.agreements import gather_json
from fgpt.distributed.launch import World
from fgpt.doctor.check import SLOW_RATIO, Check, Places, speed_text
from fgpt.doctor.devices import range_text
from fgpt.parallel.topology import Grid

KINDS: Mapping[str, str] = {
    "tensor": "tensor-parallel groups",
    "context": "context-parallel groups",
    "pipe": "pipeline groups",
    "replica": "data-parallel groups",
}
"""Kind of group (`parallel.topology`) -> its name on the page."""
COLLECTIVES = ("all-reduce", "all-gather")
FIRST_BYTES = 2**16
"""Bytes of the first message; each next one has four times as many,"""
LAST_BYTES = {"cpu": 2**24, "cuda": 2**28}
"""at most these,"""
ENOUGH_S = 0.03
"""until one takes this long: a slow network is not asked for large messages."""
REPEATS = 5
LATENCY_TRIES = 30


class GroupSpeed(NamedTuple):
    """What one group reached."""

    kind: str
    """A key of `KINDS`."""
    ranks: tuple[int, ...]
    """Its ranks, ascending."""
    bytes_per_s: Mapping[str, float]
    """Collective -> bytes that each rank sent per second, as in a ring."""
    latency_s: float
    """Median time of an all-reduce of 4 bytes for each of its ranks."""


def measure_groups(
    grid: Grid, world: World, device: torch.device, timeout: timedelta
) -> list[GroupSpeed]:
    """Measure every group of the grid with several ranks; those of a kind at the same time, as in
    training. All ranks call this, and get all results.
    """
    results = []
    for kind in KINDS:
        all_ranks = grid.groups(kind)
        if len(all_ranks[0]) == 1:
            continue
        # every rank creates every group, in the same order, and keeps its own
        groups = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in all_ranks]
        own_ranks, group = next((r, g) for r, g in groups if world.rank in r)
        own = _measure(group, device)
        gathered = gather_json(own, device)
        for ranks in all_ranks:
            speeds, latency_s = gathered[ranks[0]]
            results.append(GroupSpeed(kind, tuple(ranks), speeds, latency_s))
        dist.destroy_process_group(group)
    return results


def _measure(group: dist.ProcessGroup, device: torch.device) -> tuple[dict[str, float], float]:
    speeds = {name: _bytes_per_s(name, group, device) for name in COLLECTIVES}
    smallest = _operation("all-reduce", 4 * dist.get_world_size(group), group, device)
    latencies_s = [_seconds(smallest, device) for _ in range(LATENCY_TRIES)]
    return speeds, statistics.median(latencies_s)


def _bytes_per_s(name: str, group: dist.ProcessGroup, device: torch.device) -> float:
    """Bytes sent per second by each rank in the fastest of the largest messages."""
    n, size = dist.get_world_size(group), FIRST_BYTES
    while True:
        operation = _operation(name, size, group, device)
        operation()  # connects
        seconds = _slowest_rank_s(operation, group, device)
        if seconds >= ENOUGH_S or size >= LAST_BYTES[device.type]:
            break
        size *= 4
    best = min([seconds, *(_slowest_rank_s(operation, group, device) for _ in range(REPEATS))])
    factor = 2 if name == "all-reduce" else 1
    return factor * (n - 1) / n * size / best


def _operation(
    name: str, size: int, group: dist.ProcessGroup, device: torch.device
) -> Callable[[], object]:
    """A collective on `size` bytes in all: of each rank (all-reduce), or together (all-gather)."""
    n = dist.get_world_size(group)
    whole = torch.zeros(size // 4 // n * n, device=device)
    if name == "all-reduce":
        return partial(dist.all_reduce, whole, group=group)
    parts = list(whole.chunk(n))
    return partial(dist.all_gather, parts, parts[0].clone(), group=group)


def _slowest_rank_s(
    operation: Callable[[], object], group: dist.ProcessGroup, device: torch.device
) -> float:
    """Seconds of the operation on the group's slowest rank, on all its ranks."""
    seconds = torch.tensor([_seconds(operation, device)], device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
    return float(seconds)


def _seconds(operation: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    operation()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def best_of(first: Sequence[GroupSpeed], second: Sequence[GroupSpeed]) -> list[GroupSpeed]:
    """The better value of two measurements of the same groups."""
    return [
        a._replace(
            bytes_per_s={
                name: max(a.bytes_per_s[name], b.bytes_per_s[name]) for name in COLLECTIVES
            },
            latency_s=min(a.latency_s, b.latency_s),
        )
        for a, b in zip(first, second, strict=True)
    ]


def judge_groups(speeds: Sequence[GroupSpeed], places: Places) -> list[Check]:
    """Each group against the median of its kind; groups within one node are a separate kind."""
    by_kind: dict[tuple[str, int], list[GroupSpeed]] = {}
    for speed in speeds:
        n_nodes = len({places.nodes[rank] for rank in speed.ranks})
        by_kind.setdefault((speed.kind, n_nodes), []).append(speed)
    checks = []
    for (kind, n_nodes), group in by_kind.items():
        n = len(group[0].ranks)
        within = "" if n_nodes == 1 else f" over {n_nodes} nodes"
        title = f"{KINDS[kind]} ({len(group)} of {n} ranks{within})"
        slow = list(_slow_groups(title, group, places))
        rates = ", ".join(
            f"{name} {range_text([each.bytes_per_s[name] for each in group], 'B')}"
            for name in COLLECTIVES
        )
        latency_us = max(each.latency_s for each in group) * 1e6
        checks += slow or [Check("ok", title, f"{rates}, latency {latency_us:.0f} us")]
    return checks


def _slow_groups(title: str, group: Sequence[GroupSpeed], places: Places) -> list[Check]:
    checks = []
    for name in COLLECTIVES:
        median = statistics.median_high(each.bytes_per_s[name] for each in group)
        for each in group:
            rate = each.bytes_per_s[name]
            if rate < SLOW_RATIO * median:
                value = f"{name} {speed_text(rate, 'B')} among {places.describe(each.ranks)}"
                value += f", the median is {speed_text(median, 'B')}"
                remedy = "look at the links of these ranks (nvidia-smi topo -m; the nodes' network)"
                checks.append(Check("slow", title, value, remedy))
    return checks
