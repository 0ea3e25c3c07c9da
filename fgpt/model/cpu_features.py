"""CPU features that kernel choices depend on.

Read from the CPU's name and instruction sets, never from a timing, so that ranks on equal machines
and repeated runs choose the same kernels and round identically.
"""

from __future__ import annotations

from typing import Any

import torch

CAPABILITIES: dict[str, Any] = dict(torch.cpu.get_capabilities())
"""Torch's description of this CPU: instruction sets by name, `cpu_name`, and more."""


def multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX-512 BF16; CPUs with AMX have it too)."""
    return bool(CAPABILITIES.get("avx512_bf16"))


def prefers_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL: AVX-512 on a non-Intel CPU.

    480 instead of 220 GFLOP/s on 2 cores of an AMD EPYC (2024).
    """
    intel = "intel" in str(CAPABILITIES.get("cpu_name", "intel")).lower()
    return bool(CAPABILITIES.get("avx512_f")) and not intel and torch.backends.mkldnn.is_available()
