"""Accelerators, nodes and links: devices.json, which a user's file extends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from fgpt.errors import UserError
from fgpt.utils.keys import nearest
from fgpt.utils.strict_json import read_object

DEVICES = Path(__file__).with_name("devices.json")


@dataclass(frozen=True)
class Device:
    """One kind of accelerator, and the nodes that it is usually built into."""

    name: str
    """The key in devices.json."""
    pattern: str
    """Regular expression found in `torch.cuda.get_device_name`."""
    peak_16bit_tflops: float
    """Dense tensor-core peak."""
    memory_gib: float
    """What a program may allocate, with its CUDA context."""
    memory_gb_s: float
    """Bandwidth of the device's memory."""
    link_gb_s: float
    """From one device to others of its node, each direction."""
    watts: float
    """Of one device under load."""
    gpus_per_node: int = 8
    network_gbit_s: float = 1600.0
    """From one node to others, each direction."""
    peak_fp8_tflops: float | None = None
    host_gib_per_node: float = 1000.0
    """Host memory that a node's ranks may use."""

    def peak_tflops(self, precision: str) -> float:
        """Peak of matrix products; fp8 where the device has none counts as 16 bits."""
        if precision == "fp8" and self.peak_fp8_tflops:
            return self.peak_fp8_tflops
        return self.peak_16bit_tflops


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices."""

    device: Device
    gpus: int
    gpus_per_node: int
    network_gbit_s: float
    """From one node to others, each direction."""

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    def bandwidth_gb_s(self, ranks: int, stride: int = 1) -> float:
        """GB/s that each rank of a group can send, each direction.

        The group's ranks are `stride` apart; groups that send at the same time share the node's
        network.
        """
        if ranks * stride <= self.gpus_per_node:
            return self.device.link_gb_s
        in_node = max(self.gpus_per_node // stride, 1)  # ranks of one group in one node
        # a ring enters and leaves a node once per group; the node has as many rings as it has ranks
        # of different groups
        rings = min(stride, self.gpus_per_node)
        per_ring = self.network_gbit_s / 8 / rings
        return min(per_ring, self.device.link_gb_s) if in_node > 1 else per_ring


@cache
def devices(file: Path | None = None) -> Mapping[str, Device]:
    """Return the built-in devices and those of a file of the same form.

    Raises UserError for a file that cannot be read, and for wrong keys and values.
    """
    known = _read(DEVICES)
    return known if file is None else {**known, **_read(file)}


def find_device(name: str, file: Path | None = None) -> Device:
    """Return the device of this name. Raises UserError that lists the names."""
    known = devices(file)
    if name not in known:
        hint = nearest(name, known)
        guess = f"did you mean {hint}?" if hint else f"known: {', '.join(known)}"
        raise UserError(f"--gpu {name}: no such device; {guess} --hardware FILE adds others")
    return known[name]


def _read(file: Path) -> dict[str, Device]:
    value = read_object(file)
    table = value.get("devices")
    try:
        if not isinstance(table, dict) or not all(isinstance(e, dict) for e in table.values()):
            raise ValueError("has no object of devices")
        return {name: _device(name, entry) for name, entry in table.items()}
    except (ValueError, TypeError) as error:
        raise UserError(
            f'{file}: {error}: write {{"devices": {{"NAME": {{"peak_16bit_tflops": ...}}}}}},'
            f" with the keys of {DEVICES.name}"
        ) from error


def _device(name: str, entry: Mapping[str, Any]) -> Device:
    numbers = {
        field.name: field for field in fields(Device) if field.name not in ("name", "pattern")
    }
    unknown = set(entry) - set(numbers) - {"pattern"}
    if unknown:
        raise ValueError(f"{name}: unknown key {sorted(unknown)[0]!r}")
    for key, value in entry.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key != "pattern" and not (is_number and 0 < value < 1e9):
            raise ValueError(f"{name}.{key}: {json.dumps(value)} is not a positive number")
    return Device(
        name=name,
        pattern=entry.get("pattern", name),
        **{key: value for key, value in entry.items() if key != "pattern"},
    )
