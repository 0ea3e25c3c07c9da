"""Peak memory of this process, above what its libraries took before."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import torch

from fgpt.train.metrics import GIB, peak_memory_gib


class Peak(NamedTuple):
    """Since `Memory` was made."""

    peak_bytes: int
    """Allocated on the GPU; on a CPU resident, above what was resident then."""
    reserved_bytes: int | None
    """What torch's allocator took of the GPU."""
    what: str
    """Which of them, in words."""


class Memory:
    """Watches from where it is made on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.before_bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):  # Linux; forbidden in some containers
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
        self.before_bytes = _resident_bytes()

    def peak(self) -> Peak:
        """The peak so far."""
        if self.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
            return Peak(allocated, reserved, "allocated on the GPU")
        status = _status()
        peak = status.get("VmHWM", int(peak_memory_gib(self.device) * GIB))
        return Peak(peak - self.before_bytes, None, "resident above the libraries")


def _resident_bytes() -> int:
    return _status().get("VmRSS", 0)


def _status() -> dict[str, int]:
    """The sizes of /proc/self/status in bytes; empty where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    parts = (line.split() for line in lines)
    return {p[0].rstrip(":"): int(p[1]) * 1024 for p in parts if len(p) == 3 and p[2] == "kB"}
