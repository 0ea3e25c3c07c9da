"""Where a step's time goes on several ranks: computing, communicating, waiting for others, or data.

On a CPU collectives are waited for where they are called: the time inside torch's doors is what
they cost. On a GPU they run beside the computing: torch's profiler says when nothing else ran.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fgpt.bench.ranks.trace import device_spans, profiled
from fgpt.bench.spans import Span, alone, union
from fgpt.data.loader import MicroBatches
from fgpt.distributed.agreements import gather_json
from fgpt.parallel.topology import count_traffic

_BETWEEN_STAGES = ("send", "recv_", "recv_any_source_")


class Doors(TorchDispatchMode):
    """Seconds inside torch's collectives, waiting for them included, by what they are for."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._kind = "communication"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space != "c10d":
            return func(*args, **(kwargs or {}))
        self._kind = "pipeline" if name in _BETWEEN_STAGES else "communication"
        return self._timed(func, *args, **(kwargs or {}))

    def __enter__(self) -> Doors:
        work: Any = dist.Work
        self._wait = work.wait
        timed, wait = self._timed, self._wait
        work.wait = lambda *args, **kwargs: timed(wait, *args, **kwargs)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        work: Any = dist.Work
        work.wait = self._wait
        super().__exit__(*error)

    def _timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        t0 = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds[self._kind] += time.perf_counter() - t0


def shares(
    step: Callable[[], Any],
    n_steps: int,
    batches: MicroBatches,
    engine: Any,
    device: torch.device,
) -> dict[str, Any]:
    """Shares of `n_steps` steps' time, the mean over ranks, and bytes sent in one step more.

    All ranks call this together.
    """
    if device.type == "cuda":
        total_s, parts = _on_gpu(step, n_steps, staged=engine.groups.grid.pp > 1)
    else:
        total_s, parts = _on_cpu(step, n_steps, batches)
    mine = {name: seconds / total_s for name, seconds in parts.items()}
    mine["compute"] = 1 - sum(mine.values())
    ranks = gather_json(mine, device)
    traffic = count_traffic(engine.groups)
    with traffic:
        step()
    sent = gather_json(dict(traffic.bytes), device)
    return {
        "shares": {name: sum(rank[name] for rank in ranks) / len(ranks) for name in mine},
        "sent_bytes": {
            name: max(rank.get(name, 0) for rank in sent) for name in sorted({*sent[0]})
        },
    }


def _on_cpu(
    step: Callable[[], Any], n_steps: int, batches: MicroBatches
) -> tuple[float, dict[str, float]]:
    """Seconds in all, and those in each part."""
    t0, waited_s = time.perf_counter(), batches.wait_s
    with Doors() as doors:
        for _ in range(n_steps):
            step()
    total_s = time.perf_counter() - t0
    parts = {name: doors.seconds[name] for name in ("communication", "pipeline")}
    return total_s, {**parts, "data": batches.wait_s - waited_s}


def _on_gpu(
    step: Callable[[], Any], n_steps: int, *, staged: bool
) -> tuple[float, dict[str, float]]:
    """The same from the profiler's kernels: communication counts while no other kernel runs, and
    what is not covered by any kernel as waiting for data (or for the host).
    """
    t0 = time.perf_counter()
    profile = profiled(step, n_steps)
    total_s = time.perf_counter() - t0
    spans = device_spans(profile)
    first = min((span.begin for span in spans), default=0.0)
    last = max((span.end for span in spans), default=total_s)
    return last - first, {**exposed(spans, staged), "data": last - first - union(spans)}


def exposed(spans: list[Span], staged: bool) -> dict[str, float]:
    """Seconds in which nothing but communication ran: between stages (send, receive), and other.

    `staged`: there are stages; without, the same kernel is an all-to-all.
    """
    sent = [s for s in spans if s.kind == "communication"]
    between = [s for s in sent if staged and "SendRecv" in s.name]
    other = [s for s in sent if s not in between]
    work = [s for s in spans if s.kind != "communication"]
    return {"communication": alone(other, work), "pipeline": alone(between, work + other)}
