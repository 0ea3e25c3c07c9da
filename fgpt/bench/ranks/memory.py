"""Peak memory of this process, above what its libraries took before."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fgpt.utils.process import peak_resident_bytes, reset_peak_resident, resident_bytes


class Peak(NamedTuple):
    """Since `Memory` was made."""

    peak_bytes: int
    """Allocated on the GPU; on a CPU resident, above what was resident then."""
    reserved_bytes: int | None
    """What torch's allocator took of the GPU."""
    what: str
    """Which of them, in words."""


class Memory:
    """Measures the peak from its construction on."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            reset_peak_resident()
            self.before_bytes = resident_bytes()

    def peak(self) -> Peak:
        """The peak so far."""
        if self.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
            return Peak(allocated, reserved, "allocated on the GPU")
        above_bytes = peak_resident_bytes() - self.before_bytes
        return Peak(above_bytes, None, "resident above the libraries")
