"""Peak speeds of accelerators, for MFU: the vendors' dense numbers, without sparsity."""

from __future__ import annotations

import re

# word of torch.cuda.get_device_name -> 16-bit tensor-core peak in TFLOP/s; the first match wins
PEAK_16BIT_TFLOPS = (
    ("GH200", 989.0),
    ("GB200", 2500.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("B200", 2250.0),
    ("MI300X", 1307.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("A40", 149.7),
    ("A6000", 154.8),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("V100", 125.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("T4", 65.0),
)


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Peak of one device in TFLOP/s; None for unknown devices and in fp32."""
    if precision == "fp32":
        return None
    for word, peak in PEAK_16BIT_TFLOPS:
        if re.search(rf"\b{word}\b", device_name):
            return peak
    return None
