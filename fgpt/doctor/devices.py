"""This rank's GPU or CPU: what it is, and how fast it multiplies and copies."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fgpt.doctor.check import SLOW_RATIO, Check, Places, size_text, speed_text
from fgpt.doctor.known_devices import expected_speed
from fgpt.model.cpu_features import CAPABILITIES, multiplies_bf16

PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices whose product is timed."""
COPY_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Bytes of the tensor whose copy is timed."""
TIMED_S = 0.2
"""Each speed is that of the fastest call within this time."""
FREE_RATIO = 0.9
"""Free part of an idle GPU's memory: each process on it takes about half a GiB."""
BF16_CAPABILITY, FP8_CAPABILITY = (8, 0), (8, 9)
MEASURES: Mapping[str, str] = {
    "fp32": "matrix product, fp32",
    "bf16": "matrix product, bf16",
    "copy": "memory copy, read and written",
    "upload": "copy from the host",
}
"""Speed that is measured -> its name."""


@dataclass(frozen=True)
class DeviceFacts:
    """The device of one rank. Fields are JSON values."""

    kind: str
    """cpu or cuda."""
    name: str
    """The model."""
    native_bf16: bool = True
    """The device multiplies bf16 itself."""
    capability: tuple[int, int] | None = None
    """A GPU's compute capability."""
    identity: str = ""
    """UUID of a GPU; empty if unknown."""
    free_bytes: int = 0
    total_bytes: int = 0
    """Memory of a GPU."""
    driver: str = ""
    """Version of the GPU's driver; empty if unknown."""
    unreachable: tuple[int, ...] = ()
    """GPUs of this node whose memory this one cannot address."""
    unused_driver: str = ""
    """A driver of GPUs that torch does not see."""


def device_facts(device: torch.device) -> DeviceFacts:
    """Examine this rank's device; computes nothing."""
    driver = _nvidia_driver()
    if device.type == "cpu":
        name = str(CAPABILITIES.get("cpu_name") or "CPU")
        return DeviceFacts("cpu", name, multiplies_bf16(), unused_driver=driver)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    free, total = torch.cuda.mem_get_info(device)
    peers = (i for i in range(torch.cuda.device_count()) if i != device.index)
    return DeviceFacts(
        "cuda",
        torch.cuda.get_device_name(device),
        capability >= BF16_CAPABILITY,
        capability,
        str(getattr(properties, "uuid", "")),
        free,
        total,
        driver,
        tuple(i for i in peers if not torch.cuda.can_device_access_peer(device.index, i)),
    )


def device_from_json(value: dict[str, Any]) -> DeviceFacts:
    """The inverse of `asdict`, after a way as JSON."""
    pair = value["capability"]
    tuples = {"unreachable": tuple(value["unreachable"])}
    return DeviceFacts(**{**value, **tuples, "capability": pair and (pair[0], pair[1])})


def _nvidia_driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    match = re.search(r"\s(\d{3}\.\d+(\.\d+)?)\s", text)
    return match[1] if match else "unknown"


def judge_device(facts: DeviceFacts) -> list[Check]:
    """What one rank's device is, and what it supports."""
    checks = [_judge_precision(facts)]
    if facts.kind == "cpu":
        if facts.unused_driver:
            value = f"NVIDIA's driver {facts.unused_driver} is loaded, but torch sees no GPU"
            remedy = "install torch for that driver's CUDA, or check CUDA_VISIBLE_DEVICES"
            return [Check("warning", "device", value, remedy), *checks]
        return [Check("ok", "device", f"CPU, {facts.name}"), *checks]
    memory = f"{size_text(facts.free_bytes)} free of {size_text(facts.total_bytes)}"
    driver = f", driver {facts.driver}" if facts.driver else ""
    checks.insert(0, Check("ok", "device", f"{facts.name}, {memory}{driver}"))
    if facts.free_bytes < FREE_RATIO * facts.total_bytes:
        remedy = "another process uses this GPU: nvidia-smi names it"
        checks.append(Check("warning", "GPU memory", memory, remedy))
    if facts.unreachable:
        value = f"none to GPU {', '.join(map(str, facts.unreachable))} of the node"
        remedy = "data between them takes the way through host memory: nvidia-smi topo -p2p r"
        checks.append(Check("slow", "GPU peer access", value, remedy))
    return checks


def _judge_precision(facts: DeviceFacts) -> Check:
    if facts.kind == "cpu":
        bf16 = "native" if facts.native_bf16 else "emulated, slower than fp32"
        return Check("ok", "precision", f"fp32; bf16 {bf16}; no fp16")
    bf16 = "bf16" if facts.native_bf16 else "bf16 emulated, slower than fp16"
    fp8 = ", fp8" if (facts.capability or (0, 0)) >= FP8_CAPABILITY else ""
    return Check("ok", "precision", f"fp32, fp16, {bf16}{fp8}")


def judge_sharing(facts: Sequence[DeviceFacts], places: Places) -> list[Check]:
    """A GPU belongs to one rank, and all ranks have the same kind of device."""
    checks = []
    ranks_by_gpu: dict[str, list[int]] = {}
    for rank, each in enumerate(facts):
        if each.identity:
            ranks_by_gpu.setdefault(each.identity, []).append(rank)
    for ranks in ranks_by_gpu.values():
        if len(ranks) > 1:
            value = f"one GPU for {places.describe(ranks)}"
            checks.append(Check("error", "device", value, "start one rank per GPU"))
    names = {each.name: None for each in facts}
    if len(names) > 1:
        value = "; ".join(
            f"{name}: {places.describe([r for r, f in enumerate(facts) if f.name == name])}"
            for name in names
        )
        checks.append(Check("warning", "devices differ", value, "the slowest sets the pace"))
    return checks


def measure_speeds(device: torch.device) -> dict[str, float]:
    """Measure -> FLOP/s of products, B/s of copies (a copy's bytes are read and written).

    Takes about TIMED_S for each measure.
    """
    side, size = PRODUCT_SIDE[device.type], COPY_BYTES[device.type]
    speeds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(x)
        speeds[name] = 2 * side**3 / _fastest_s(partial(torch.mm, x, y, out=out), device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    speeds["copy"] = 2 * size / _fastest_s(partial(target.copy_, source), device)
    if device.type == "cuda":
        host = torch.ones(2**28, dtype=torch.uint8).pin_memory()
        part = target[: len(host)]
        seconds = _fastest_s(partial(part.copy_, host, non_blocking=True), device)
        speeds["upload"] = len(host) / seconds
    return speeds


def _fastest_s(operation: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call, of at least three, after a first one."""
    seconds: list[float] = []
    while len(seconds) < 4 or sum(seconds[1:]) < TIMED_S:
        start = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def judge_speeds(
    speeds: Sequence[Mapping[str, float]], facts: Sequence[DeviceFacts], places: Places
) -> list[Check]:
    """Each rank's speeds against the median of its kind of device, and against its data sheet."""
    checks = []
    for measure, title in MEASURES.items():
        values = {rank: each[measure] for rank, each in enumerate(speeds) if measure in each}
        if not values:
            continue
        unit = "B" if measure in ("copy", "upload") else "FLOP"
        slow = [
            Check("slow", title, f"{places.describe([rank])}: {reason}", _remedy(facts[rank].kind))
            for rank, value in values.items()
            if (reason := _why_slow(rank, value, measure, unit, values, facts)) is not None
        ]
        text = range_text(list(values.values()), unit)
        expected = expected_speed(facts[0].name, measure)
        if expected is not None:
            text += f" of {speed_text(expected.per_second, unit)} ({expected.source})"
        checks += slow or [Check("ok", title, text)]
    return checks


def _why_slow(
    rank: int,
    value: float,
    measure: str,
    unit: str,
    values: Mapping[int, float],
    facts: Sequence[DeviceFacts],
) -> str | None:
    # of two devices the faster one is the reference
    peers = [v for r, v in values.items() if facts[r].name == facts[rank].name]
    median = statistics.median_high(peers)
    text = speed_text(value, unit)
    if value < SLOW_RATIO * median:
        return f"{text}, the median of its kind is {speed_text(median, unit)}"
    expected = expected_speed(facts[rank].name, measure)
    if expected is not None and value < expected.ratio * expected.per_second:
        return f"{text} of {speed_text(expected.per_second, unit)} ({expected.source})"
    return None


def _remedy(kind: str) -> str:
    if kind == "cpu":
        return "look for other processes and for throttling on its node, or leave the node out"
    return "look at clocks, temperature, power and PCIe width (nvidia-smi -q), or leave it out"


def range_text(values: Sequence[float], unit: str) -> str:
    """`45 GFLOP/s` of one rank, `45 GFLOP/s to 47 GFLOP/s per rank` of several."""
    low, high = (speed_text(value, unit) for value in (min(values), max(values)))
    if len(values) == 1:
        return low
    return f"{low} per rank" if low == high else f"{low} to {high} per rank"
