"""What this machine is, and whether its device is as fast as its kind."""

from __future__ import annotations

import time

import torch

from fgpt.acceptance.check import Findings
from fgpt.bench.machine import product_tflops
from fgpt.plan.hardware import peak_tflops

COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
LOWEST_SHARE = 0.5
"""Of the vendor's peak that matrix products must reach: a throttled or shared GPU is below."""


def check_machine(found: Findings) -> None:
    """Matrix products in fp32 and bf16, and the speed of copies within the device's memory."""
    speeds = product_tflops(found.device)
    for precision, tflops in speeds.items():
        found.figure(f"matrix product, {precision}", tflops, "TFLOP/s")
    found.figure("copy, bytes read and written", _copy_rate(found.device), "GB/s")
    if not found.on_gpu:
        found.skip("share of the vendor's peak")
        return
    name = torch.cuda.get_device_name(found.device)
    peak = peak_tflops(name, "bf16")
    if peak is None:
        found.skip("share of the vendor's peak", f"not run: no peak is known for {name}")
        return
    share = speeds["bf16"] / peak
    found.figure("share of the vendor's peak, bf16", share, "of 1")
    found.require(
        share >= LOWEST_SHARE,
        f"matrix products reach {share:.0%} of the {peak:g} TFLOP/s of {name}: is it shared, hot"
        " (nvidia-smi -q -d PERFORMANCE), or limited in power?",
    )


def _copy_rate(device: torch.device) -> float:
    """GB/s of the fastest of five copies, read and written bytes."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target, fastest_s = torch.empty_like(source), float("inf")
    for _ in range(6):  # the first one touches the memory
        t0 = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest_s = min(fastest_s, time.perf_counter() - t0)
    return 2 * source.numel() / fastest_s / 1e9
