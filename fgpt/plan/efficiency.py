"""Constants of the step-time model, by kind of GPU: efficiency.json, which `plan.fit` writes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

EFFICIENCY = Path(__file__).with_name("efficiency.json")


@dataclass(frozen=True)
class Efficiency:
    """What one kind of GPU and its links reach of their peaks. Fractions have no unit."""

    matrix: float
    """Of the 16-bit peak, in large matrix products."""
    matrix_fp8: float
    """Of the fp8 peak, in large matrix products."""
    half_outputs: float
    """Elements of a result at which a product reaches half of that (waves of thread blocks)."""
    half_depth: float
    """Length of the sum at which it does (filling and draining a tile's pipeline)."""
    half_depth_fp8: float
    """The same of fp8 products, with the work on their scales."""
    attention_forward: float
    """Of the 16-bit peak, fused attention; only the scores that the causal mask allows count."""
    attention_backward: float
    flash: float
    """Factor on both where the kernel is FlashAttention-2, and not cuDNN's of Transformer Engine
    (one H100, 124M parameters: 13.4 ms a step, cuDNN 9.2; on an A100 they are equal)."""
    half_keys: float
    """Tokens of a sample at which fused attention reaches half of that."""
    memory: float
    """Of the memory's bandwidth, elementwise kernels and norms."""
    unaligned: float
    """Factor on the batched products of unfused attention, of heads whose width is no multiple of 8
    elements: they leave most of the tensor cores idle."""
    misaligned: float
    """Factor on products of which a width is no multiple of 64 elements; twice that if it is none
    of 8 either."""
    kernel_us: float
    """Microseconds between two kernels on the device."""
    host_us: float
    """Microseconds in which the host starts one kernel, torch's eager mode with its Python."""
    host_megatron_us: float
    """The same of Megatron's modules."""
    link: float
    """Of the bandwidth within a node, in collectives."""
    link_us: float
    """Microseconds of each step of a ring within a node."""
    network: float
    """Of the bandwidth between nodes, in collectives and sends."""
    network_us: float
    """Microseconds of each step of a ring between nodes, and of a send."""
    sync_us: float
    """Microseconds that each tensor-parallel sum waits beside its bytes in Megatron-DeepSpeed of
    2021 and 2022 (its rows show them at every size; not in Megatron-LM)."""
    tensor_overlap: float
    """Of tensor-parallel communication, what Transformer Engine hides behind products."""
    data_interference: float
    """Of the time that bytes of overlapped data-parallel communication would take within a node,
    what kernels lose."""
    low: float
    """Measured / predicted time: the 10th percentile of rows that were not fitted."""
    high: float
    """The 90th percentile."""


@cache
def efficiencies(file: Path = EFFICIENCY) -> dict[str, Efficiency]:
    """Return GPU kind -> its constants, of efficiency.json."""
    document = json.loads(file.read_text(encoding="utf-8"))
    return {name: _entry(document, name) for name in document["kinds"]}


def efficiency_of(device: str) -> Efficiency:
    """Return the constants of a device of devices.json, by the part of its name before '-'.

    A device of a user's file that no kind names gets those of an H100.
    """
    known = efficiencies()
    return known.get(device.split("-")[0], known["h100"])


def _entry(document: dict[str, Any], name: str) -> Efficiency:
    entry = document["kinds"][name]
    base = document["kinds"][entry["as"]] if "as" in entry else {}
    values = {**document["common"], **base, **entry}
    return Efficiency(**{field.name: float(values[field.name]) for field in fields(Efficiency)})
