"""A peak belongs to the named device, not to one whose name is part of it."""

from __future__ import annotations

import pytest

from fgpt.plan.hardware import peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("Tesla T4", 65.0),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA T400 4GB", None),
        ("cpu", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_tflops(name, "bf16") == peak
    assert peak_tflops(name, "fp32") is None
