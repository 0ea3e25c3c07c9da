"""What the CPU is, where a faster way depends on it.

Decided from its name and its instructions alone, never by a timing: ranks on equal machines, and
two runs on one machine, take the same way and round alike.
"""

from __future__ import annotations

from typing import Any

import torch

CAPABILITIES: dict[str, Any] = dict(torch.cpu.get_capabilities())
"""What torch says of this CPU: instruction sets by name, `cpu_name`, and more."""


def multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively, as AVX-512 (or AMX, which includes it) does."""
    return bool(CAPABILITIES.get("avx512_bf16"))


def prefers_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL does: AVX-512, and not Intel's.

    On an AMD EPYC of 2024 480 GFLOP/s instead of 220, on 2 cores.
    """
    intel = "intel" in str(CAPABILITIES.get("cpu_name", "intel")).lower()
    return bool(CAPABILITIES.get("avx512_f")) and not intel and torch.backends.mkldnn.is_available()
