"""torch's profiler over some steps: a trace to look at, and a summary by kind of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fgpt.bench.spans import Span, shares_of, union

_MICROSECOND = 1e-6


def trace(
    step: Callable[[], Any], n_steps: int, file: str | None, device: torch.device
) -> dict[str, Any]:
    """Shares of the steps' time by kind of work (`fgpt.bench.spans.KINDS`) and idle.

    On a GPU of its kernels, on a CPU of torch's operators. The trace goes to `file` (.json.gz), for
    chrome://tracing or Perfetto.
    """
    t0 = time.perf_counter()
    found = profiled(step, n_steps)
    total_s = time.perf_counter() - t0
    if file is not None:
        found.export_chrome_trace(file)
    if device.type == "cpu":
        work = own_seconds(found)
        return {"trace": shares_of(work, sum(own_s for _, own_s in work), total_s)}
    spans = device_spans(found)
    first, last = min(s.begin for s in spans), max(s.end for s in spans)
    work = [(span.name, span.end - span.begin) for span in spans]
    return {"trace": shares_of(work, union(spans), last - first)}


def profiled(step: Callable[[], Any], n_steps: int) -> profile:
    """The profile of some steps, after one that lets the profiler get going."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities):
        step()
    with profile(activities=activities) as found:
        for _ in range(n_steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return found


def device_spans(found: profile) -> list[Span]:
    """The GPU's kernels and copies."""
    return [_span(e) for e in _events(found) if e.device_type == torch.autograd.DeviceType.CUDA]


def own_seconds(found: profile) -> list[tuple[str, float]]:
    """torch's operators on the CPU, and the time that each took without those that it called."""
    events = [e for e in _events(found) if e.name.startswith(("aten::", "c10d::", "mkldnn::"))]
    return [(e.name, e.self_cpu_time_total * _MICROSECOND) for e in events]


def _events(found: profile) -> list[Any]:
    events: Any = found.events()
    return list(events or ())


def _span(event: Any) -> Span:
    begin, end = event.time_range.start, event.time_range.end
    return Span(event.name, begin * _MICROSECOND, end * _MICROSECOND)
