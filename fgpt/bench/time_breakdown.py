"""Where a step's time goes: by kind of kernel, and by activity of the ranks."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fgpt.data.loader import MicroBatches
from fgpt.distributed.agreements import gather_json
from fgpt.parallel.topology import count_traffic

KERNEL_KINDS = ("matrix products", "attention", "optimizer", "communication", "element-wise")
# the first pattern that matches a kernel's or operator's name decides its kind
_PATTERNS = (
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|broadcast_"),
    ("attention", r"flash|fmha|attention|sdpa|cudnn.*(fprop|bprop)|::_(safe_)?softmax"),
    ("optimizer", r"adam|multi_tensor|foreach|FusedOptimizer"),
    ("matrix products", r"gemm|matmul|cublas|cutlass|nvjet|wgmma|\bmm\b|bmm|addmm|mkldnn|linear"),
)
_PIPELINE_OPS = ("send", "recv_", "recv_any_source_")


class Span(NamedTuple):
    """The execution of one kernel or operator; times in seconds."""

    name: str
    begin: float
    end: float


def kind_of(name: str) -> str:
    """Kind of a kernel or operator by its name; "element-wise" if no pattern matches."""
    for kind, pattern in _PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "element-wise"


def covered_s(spans: Sequence[Span]) -> float:
    """Seconds in which at least one span ran."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        total += max(0.0, span.end - max(span.begin, reached))
        reached = max(reached, span.end)
    return total


def exclusive_s(spans: Sequence[Span], others: Sequence[Span]) -> float:
    """Seconds in which one of `spans` ran and none of `others`."""
    return covered_s([*spans, *others]) - covered_s(others)


def kind_fractions(
    timings: Iterable[tuple[str, float]], busy_s: float, total_s: float
) -> dict[str, float]:
    """Fraction of `total_s` per kernel kind, and "idle", from (name, seconds) pairs.

    `busy_s`: seconds in which any of them ran.
    """
    seconds = dict.fromkeys(KERNEL_KINDS, 0.0)
    for name, self_s in timings:
        seconds[kind_of(name)] += self_s
    fractions = {kind: value / total_s for kind, value in seconds.items()}
    return {**fractions, "idle": max(0.0, 1 - busy_s / total_s)}


def trace_steps(
    step: Callable[[], Any], n_steps: int, file: str | None, device: torch.device
) -> dict[str, Any]:
    """Profile some steps; return the record's `trace`: the fraction of time per kernel kind.

    It counts kernels on a GPU, torch's operators on a CPU. `file` (.json.gz) receives the trace for
    Perfetto or chrome://tracing.
    """
    t0 = time.perf_counter()
    profiled = _profile(step, n_steps)
    total_s = time.perf_counter() - t0
    if file is not None:
        profiled.export_chrome_trace(file)
    if device.type == "cpu":
        names = ("aten::", "c10d::", "mkldnn::")
        events = [event for event in _events(profiled) if event.name.startswith(names)]
        timings = [(event.name, event.self_cpu_time_total * 1e-6) for event in events]
        return {"trace": kind_fractions(timings, sum(s for _, s in timings), total_s)}
    spans = _device_spans(profiled)
    total_s = max(span.end for span in spans) - min(span.begin for span in spans)
    timings = [(span.name, span.end - span.begin) for span in spans]
    return {"trace": kind_fractions(timings, covered_s(spans), total_s)}


def _profile(step: Callable[[], Any], n_steps: int) -> profile:
    """Profile some steps, after one that warms the profiler up."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities):
        step()
    with profile(activities=activities) as profiled:
        for _ in range(n_steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiled


def _events(profiled: profile) -> list[Any]:
    events: Any = profiled.events()
    return list(events or ())


def _device_spans(profiled: profile) -> list[Span]:
    """The GPU's kernels and copies."""
    return [
        Span(event.name, event.time_range.start * 1e-6, event.time_range.end * 1e-6)
        for event in _events(profiled)
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def time_breakdown(
    step: Callable[[], Any],
    n_steps: int,
    batches: MicroBatches,
    engine: Any,
    device: torch.device,
) -> dict[str, Any]:
    """Return the record's `shares` and `sent_bytes`; all ranks call this together.

    shares: fractions of the time of `n_steps` steps, mean over the ranks; sent_bytes: sent in one
    more step by the rank that sends most, per kind of process group.
    """
    if device.type == "cuda":
        total_s, seconds = _measure_gpu(step, n_steps, has_stages=engine.groups.grid.pp > 1)
    else:
        total_s, seconds = _measure_cpu(step, n_steps, batches)
    fractions = {name: value / total_s for name, value in seconds.items()}
    fractions["compute"] = 1 - sum(fractions.values())
    per_rank = gather_json(fractions, device)
    traffic = count_traffic(engine.groups)
    with traffic:
        step()
    sent = gather_json(dict(traffic.bytes), device)
    return {
        "shares": {
            name: sum(rank[name] for rank in per_rank) / len(per_rank) for name in fractions
        },
        "sent_bytes": {name: max(rank.get(name, 0) for rank in sent) for name in sorted(sent[0])},
    }


def _measure_cpu(
    step: Callable[[], Any], n_steps: int, batches: MicroBatches
) -> tuple[float, dict[str, float]]:
    """Total seconds, and those spent in communication, in the pipeline, and waiting for data.

    On a CPU collectives block where they are called, so the time inside the calls is their cost.
    """
    t0, waited_s = time.perf_counter(), batches.wait_s
    with CollectiveTimer() as timer:
        for _ in range(n_steps):
            step()
    total_s = time.perf_counter() - t0
    seconds = {name: timer.seconds[name] for name in ("communication", "pipeline")}
    return total_s, {**seconds, "data": batches.wait_s - waited_s}


class CollectiveTimer(TorchDispatchMode):
    """Seconds inside c10d operations and `Work.wait`: "pipeline" (point to point) or
    "communication".
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._kind = "communication"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "c10d":
            return func(*args, **(kwargs or {}))
        self._kind = "pipeline" if name in _PIPELINE_OPS else "communication"
        return self._time(func, *args, **(kwargs or {}))

    def __enter__(self) -> CollectiveTimer:
        work: Any = dist.Work
        time_call, self._wait = self._time, work.wait
        wait = self._wait
        work.wait = lambda *args, **kwargs: time_call(wait, *args, **kwargs)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        work: Any = dist.Work
        work.wait = self._wait
        super().__exit__(*error)

    def _time(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        t0 = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds[self._kind] += time.perf_counter() - t0


def _measure_gpu(
    step: Callable[[], Any], n_steps: int, *, has_stages: bool
) -> tuple[float, dict[str, float]]:
    """The same from the profiled kernels, which run asynchronously.

    Time without any kernel counts as waiting for data (it may also be waiting for the host).
    """
    t0 = time.perf_counter()
    profiled = _profile(step, n_steps)
    total_s = time.perf_counter() - t0
    spans = _device_spans(profiled)
    begin = min((span.begin for span in spans), default=0.0)
    end = max((span.end for span in spans), default=total_s)
    exposed = exposed_communication_s(spans, has_stages)
    return end - begin, {**exposed, "data": end - begin - covered_s(spans)}


def exposed_communication_s(spans: Sequence[Span], has_stages: bool) -> dict[str, float]:
    """Seconds in which only communication ran: between pipeline stages, and all other.

    `has_stages`: without a pipeline, a SendRecv kernel is an all-to-all.
    """
    sent = [span for span in spans if kind_of(span.name) == "communication"]
    pipeline = [span for span in sent if has_stages and "SendRecv" in span.name]
    other = [span for span in sent if span not in pipeline]
    work = [span for span in spans if kind_of(span.name) != "communication"]
    return {
        "communication": exclusive_s(other, work),
        "pipeline": exclusive_s(pipeline, work + other),
    }
