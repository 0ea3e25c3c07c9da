"""What a record says of its machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.bench import machine as module
from fgpt.bench.machine import hardware, machine, peak, product_tflops

CPU = torch.device("cpu")
GENOA = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu sse4_2 avx avx2 avx512f avx512_bf16

processor\t: 1
model\t\t: 99
"""


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine() with this /proc/cpuinfo, caches and memory."""

    def describe(cpuinfo: str, l3_kib: int = 32768, memory: int = 24 * 2**30) -> dict[str, Any]:
        real = Path.read_text
        monkeypatch.setattr(
            Path, "read_text", lambda p: cpuinfo if str(p) == "/proc/cpuinfo" else real(p)
        )
        monkeypatch.setattr(module, "_caches", lambda: {"L2": 1024, "L3": l3_kib})
        monkeypatch.setattr(module, "_total_memory", lambda: memory)
        monkeypatch.setattr(module, "_usable_cores", lambda: 2)
        return machine(CPU)

    return describe


def test_a_processor(described: Any) -> None:
    facts = described(GENOA)
    assert facts == {
        "name": "AMD EPYC",
        "vendor_id": "AuthenticAMD",
        "family": "25",
        "model": "17",
        "stepping": "1",
        "vector_extensions": ["sse4_2", "avx", "avx2", "avx512f", "avx512_bf16"],
        "cache_kib": {"L2": 1024, "L3": 32768},
        "cores": 2,
        "memory_gib": 24,
    }
    name = "AMD EPYC family 25 model 17 stepping 1, avx512_bf16, L3 32 MiB, 24 GiB, 2 cores"
    assert hardware(facts) == name


def test_two_generations_with_one_name_differ(described: Any) -> None:
    names = {
        hardware(described(GENOA)),
        hardware(described(GENOA.replace("model\t\t: 17", "model\t\t: 1"))),
        hardware(described(GENOA.replace("stepping\t: 1", "stepping\t: 2"))),
        hardware(described(GENOA.replace(" avx512_bf16", ""))),
        hardware(described(GENOA, l3_kib=65536)),
        hardware(described(GENOA, memory=2**35)),
    }
    assert len(names) == 6


def test_without_proc_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cpu_info", dict)
    monkeypatch.setattr(module, "_caches", dict)
    assert hardware(machine(CPU)).endswith(" cores")


def test_this_machine() -> None:
    facts = machine(CPU)
    assert facts["name"] in hardware(facts) and facts["memory_gib"] > 0
    speeds = product_tflops(CPU)
    assert set(speeds) == {"fp32", "bf16"} and all(speed > 0 for speed in speeds.values())
    assert peak(CPU, "bf16", speeds)[0] == speeds["bf16"]
