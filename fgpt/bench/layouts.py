"""What `fgpt bench multi` measures, as data: layouts and scaling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fgpt.bench.scenarios import Scenario, Section
from fgpt.bench.workloads import Variant, Workload


def multi(row: Workload, n_ranks: int) -> Iterator[Scenario]:
    """All scenarios on up to `n_ranks` ranks. One rank takes the global batch of two."""
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < n_ranks] + [n_ranks]
    batch = 2 * row.micro_batch
    first = Variant("1 rank", "one process with all cores", "zero1", "fastest", accumulation=2)
    alone = Variant("1 rank, weak", "one rank's share of the batch", "zero1", "fastest")
    more = [n for n in sizes if n > 1]
    sections: tuple[tuple[Section, list[Variant]], ...] = (
        ("layouts", [first, *_layouts(n_ranks, row)]),
        ("strong", [_strong(n, batch // n) for n in more if batch % n == 0]),
        ("weak", [alone, *(_weak(n) for n in more)]),
    )
    for number, (section, rungs) in enumerate(sections):
        for place, rung in enumerate(rungs):
            yield Scenario("multi", section, row, rung, first.name, (number, place))


def _layouts(n_ranks: int, row: Workload) -> Iterator[Variant]:
    """ZeRO, offload and each kind of parallelism over two ranks, pairs of kinds over four; all with
    the global batch of two ranks.
    """
    if n_ranks < 2:
        return
    stages = {
        "ZeRO-0, fp32": ("zero0", "everything on every rank"),
        "ZeRO-1": ("zero1", "the optimizer's state shared out"),
        "ZeRO-2": ("zero2", "gradients, too"),
        "ZeRO-3": ("zero3", "weights, too"),
        "ZeRO-2 offload": ("zero2_offload", "optimizer and gradients in CPU memory"),
    }
    for name, (json, adds) in stages.items():
        yield Variant(name, adds, json, "fp32" if json == "zero0" else "fastest", ranks=2)
    tp2, pp2 = {"parallel.tp": 2}, {"parallel.pp": 2}
    sp2 = {**tp2, "parallel.sequence": True}
    halves: dict[str, Any] = {"ranks": 2, "accumulation": 2}
    yield Variant("tp 2", "each matrix shared out", "zero1", "fastest", tp2, **halves)
    yield Variant("tp 2, sequence", "tokens between them, too", "zero1", "fastest", sp2, **halves)
    yield Variant(
        "cp 2", "each sequence shared out", "zero1", "fastest", {"parallel.cp": 2}, **halves
    )
    quarters: dict[str, Any] = {"accumulation": 4, "micro_batch": row.micro_batch // 2}
    summed = "zero1_fp32_gradients"
    yield Variant(
        "pp 2", "two stages, 4 micro-batches", summed, "fastest", pp2, ranks=2, **quarters
    )
    if n_ranks >= 4:
        both = {**tp2, **pp2}
        yield Variant("tp 2 x pp 2", "both", summed, "fastest", both, ranks=4, **quarters)
        yield Variant("tp 2 x dp 2", "both", "zero1", "fastest", tp2, ranks=4)


def _strong(n: int, micro: int) -> Variant:
    return Variant(f"{n} ranks", "the same batch", "zero1", "fastest", ranks=n, micro_batch=micro)


def _weak(n: int) -> Variant:
    return Variant(f"{n} ranks, weak", f"{n} times the batch", "zero1", "fastest", ranks=n)
