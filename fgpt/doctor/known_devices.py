"""What vendors promise of accelerators: the data sheets' dense numbers."""

from __future__ import annotations

import re
from typing import NamedTuple

from fgpt.plan.hardware import peak_tflops


class DataSheet(NamedTuple):
    """One accelerator's peaks."""

    fp32_tflops: float
    """Products of float32 matrices without TF32, in TFLOP/s."""
    memory_gb_per_s: float
    """Bandwidth of its memory, in GB/s."""
    source: str
    """The document that says so."""


# pattern of torch.cuda.get_device_name -> its data sheet; the first match counts. The 16-bit peaks
# are in fgpt.plan.hardware.
DATA_SHEETS: tuple[tuple[str, DataSheet], ...] = (
    ("A100.*80GB PCIe", DataSheet(19.5, 1935, "NVIDIA A100 data sheet")),
    ("A100.*80GB", DataSheet(19.5, 2039, "NVIDIA A100 data sheet")),
    ("A100.*40GB", DataSheet(19.5, 1555, "NVIDIA A100 data sheet")),
    ("H100 PCIe", DataSheet(51, 2000, "NVIDIA H100 data sheet")),
    ("H100 NVL", DataSheet(60, 3900, "NVIDIA H100 data sheet")),
    ("H100", DataSheet(67, 3350, "NVIDIA H100 data sheet")),
    ("H200 NVL", DataSheet(60, 4800, "NVIDIA H200 data sheet")),
    ("H200", DataSheet(67, 4800, "NVIDIA H200 data sheet")),
    (r"\bB200", DataSheet(75, 8000, "NVIDIA HGX B200 data sheet, an eighth")),
    ("L40S", DataSheet(91.6, 864, "NVIDIA L40S data sheet")),
    ("RTX 4090", DataSheet(82.6, 1008, "NVIDIA Ada architecture white paper")),
    ("MI300X", DataSheet(163.4, 5300, "AMD Instinct MI300X data sheet")),
)
PRODUCT_RATIO, COPY_RATIO = 0.5, 0.7
"""A healthy device reaches these fractions of its data sheet's products and memory bandwidth."""


class Expected(NamedTuple):
    """What a speed should be."""

    per_second: float
    """The data sheet's FLOP/s or B/s."""
    ratio: float
    """Below this fraction of it a device is slow."""
    source: str
    """The document."""


def expected_speed(device_name: str, measure: str) -> Expected | None:
    """Of `fp32`, `bf16` (products) or `copy`; None for unknown devices and measures."""
    sheet = next((sheet for word, sheet in DATA_SHEETS if re.search(word, device_name)), None)
    if sheet is None:
        return None
    if measure == "copy":
        return Expected(sheet.memory_gb_per_s * 1e9, COPY_RATIO, sheet.source)
    tflops = {"fp32": sheet.fp32_tflops, "bf16": peak_tflops(device_name, "bf16")}.get(measure)
    return None if tflops is None else Expected(tflops * 1e12, PRODUCT_RATIO, sheet.source)
