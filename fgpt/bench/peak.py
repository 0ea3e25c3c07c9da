"""What a device can do at best, for MFU: a vendor's figure, or the fastest matrix product here."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fgpt.engine.base import DTYPES
from fgpt.model.cpu_features import prefers_onednn
from fgpt.model.linear import onednn_linear
from fgpt.plan.hardware import peak_tflops

SIDE = 2048
"""Of the square matrices."""
TRIES = 5


def peak(device: torch.device, precision: str) -> tuple[float | None, str | None]:
    """TFLOP/s of one device (a CPU: all its cores), and where the figure is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return peak_tflops(name, precision), f"{name}, dense 16-bit peak by its vendor"
    x, weight = (torch.randn(SIDE, SIDE).to(DTYPES[precision]) for _ in range(2))
    ways = [F.linear, *([onednn_linear] if prefers_onednn() else [])]
    with torch.no_grad():
        best_s = min(_seconds(partial(way, x, weight)) for way in ways)
    source = f"fastest of {TRIES} products of {SIDE} x {SIDE} matrices measured here"
    return 2 * SIDE**3 / best_s / 1e12, source


def _seconds(product: Callable[[], Tensor]) -> float:
    """The fastest of some tries, after one that does not count."""
    product()
    seconds = []
    for _ in range(TRIES):
        t0 = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - t0)
    return min(seconds)
