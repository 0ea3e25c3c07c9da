"""The machine of a measurement: what distinguishes it from others, and how fast it multiplies."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from fgpt.engine.base import DTYPES
from fgpt.model.cpu_features import prefers_onednn
from fgpt.model.linear import onednn_linear
from fgpt.plan.hardware import peak_tflops

VECTOR_EXTENSIONS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "neon", "asimd", "sve",
    "sve2", "bf16", "i8mm",
)  # fmt: skip
"""The names of /proc/cpuinfo that are recorded, from narrow to wide."""
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product is timed."""
PRODUCT_TRIES = 5
PRODUCT_S = 1.0
"""Seconds after which no further try starts."""


def machine(device: torch.device) -> dict[str, Any]:
    """Everything known that makes two machines differ in speed; no name of the host."""
    facts: dict[str, Any] = {"cores": _usable_cores(), "memory_gib": _gib(_total_memory())}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "name": torch.cuda.get_device_name(device),
            "gpu_memory_gib": _gib(properties.total_memory),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpus": torch.cuda.device_count(),
            **facts,
        }
    info = _cpu_info()
    flags = (info.get("flags") or info.get("Features") or "").split()
    named = ("vendor_id", "cpu family", "model", "stepping")
    return {
        "name": info.get("model name") or platform.processor() or platform.machine(),
        **{name.removeprefix("cpu "): info[name] for name in named if name in info},
        "vector_extensions": [name for name in VECTOR_EXTENSIONS if name in flags],
        "cache_kib": _caches(),
        **facts,
    }


def hardware(facts: dict[str, Any]) -> str:
    """One line that names a `machine`. A CPU's ends with the cores that this process may use."""
    if "gpus" in facts:
        return str(facts["name"])
    parts = [facts["name"]]
    if "family" in facts:
        parts[0] += f" family {facts['family']} model {facts.get('model')}"
        parts[0] += f" stepping {facts.get('stepping')}"
    parts += facts["vector_extensions"][-1:]
    if cache := facts["cache_kib"].get("L3"):
        parts.append(f"L3 {cache // 1024} MiB")
    return ", ".join([*parts, f"{facts['memory_gib']} GiB", f"{facts['cores']} cores"])


def product_tflops(device: torch.device) -> dict[str, float]:
    """Precision -> TFLOP/s of the fastest of a few matrix products measured now, on all cores."""
    return {precision: _product_tflops(device, precision) for precision in ("fp32", "bf16")}


def _product_tflops(device: torch.device, precision: str) -> float:
    side = PRODUCT_SIDE[device.type]
    x, weight = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    products: list[Callable[..., Tensor]] = [F.linear]
    if device.type == "cpu" and prefers_onednn():
        products.append(onednn_linear)
    with torch.no_grad():
        best_s = min(_fastest_s(partial(product, x, weight), device) for product in products)
    return 2 * side**3 / best_s / 1e12


def peak(
    device: torch.device, precision: str, measured: Mapping[str, float]
) -> tuple[float | None, str | None]:
    """Peak TFLOP/s of one device (a CPU: all its cores) for the MFU, and the source of the figure.

    A GPU's is its vendor's; a CPU's is `measured`, what `product_tflops` returned.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return peak_tflops(name, precision), f"{name}, dense 16-bit peak by its vendor"
    side = PRODUCT_SIDE["cpu"]
    source = f"fastest of {PRODUCT_TRIES} products of {side} x {side} matrices measured here"
    return measured[precision], source


def _fastest_s(product: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of the fastest try, after one warmup call."""
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) <= PRODUCT_TRIES:
        if len(seconds) > 1 and time.perf_counter() - start > PRODUCT_S:
            break
        t0 = time.perf_counter()
        product()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - t0)
    return min(seconds[1:])


def _usable_cores() -> int:
    on_linux = sys.platform == "linux"
    return len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1


def _total_memory() -> int:
    return int(psutil.virtual_memory().total)


def _gib(size_bytes: int) -> int:
    return round(size_bytes / 2**30)


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = text.partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _caches() -> dict[str, int]:
    """KiB of the first processor's data and unified caches by level; empty where unknown."""
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = (
                (folder / name).read_text().strip() for name in ("type", "level", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and (number := re.fullmatch(r"(\d+)K", size)):
            caches[f"L{level}"] = int(number[1])
    return caches
