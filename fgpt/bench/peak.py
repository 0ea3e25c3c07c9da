"""What a device can do at best, for MFU: a vendor's figure, or the fastest matrix product here."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fgpt.engine.precision import DTYPES
from fgpt.model.linear import Linear
from fgpt.plan.hardware import peak_tflops

SIDE = 2048
"""Of the square matrices."""
TRIES = 5


def peak(device: torch.device, precision: str) -> tuple[float | None, str | None]:
    """TFLOP/s of one device (a CPU: all its cores), and where the figure is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return peak_tflops(name, precision), f"{name}, dense 16-bit peak by its vendor"
    x = torch.randn(SIDE, SIDE).to(DTYPES[precision])
    layer = Linear(SIDE, SIDE, bias=False)
    layer.weight.data = torch.randn(SIDE, SIDE).to(DTYPES[precision])
    with torch.no_grad():
        best_s = min(_seconds(layer, x), _seconds(lambda x: F.linear(x, layer.weight), x))
    source = f"fastest of {TRIES} products of {SIDE} x {SIDE} matrices measured here"
    return 2 * SIDE**3 / best_s / 1e12, source


def _seconds(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The fastest of some tries, after one that does not count."""
    product(x)
    seconds = []
    for _ in range(TRIES):
        t0 = time.perf_counter()
        product(x)
        seconds.append(time.perf_counter() - t0)
    return min(seconds)
