"""What planted values mean: each fault is named, with its rank and a remedy; health is silent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fgpt.distributed.launch import World
from fgpt.doctor.check import Check, Places, merge, worst
from fgpt.doctor.clock import judge_clocks, offsets_from
from fgpt.doctor.devices import judge_device, judge_sharing, judge_speeds
from fgpt.doctor.groups import GroupSpeed, judge_groups
from fgpt.doctor.host import judge_host, node_names
from fgpt.doctor.known_devices import DATA_SHEETS, expected_speed
from fgpt.doctor.links import judge_links, rounds
from fgpt.doctor.software import (
    LIBRARIES,
    differing,
    judge_agreement,
    judge_version_agreement,
    judge_versions,
    supported_versions,
)
from tests.doctor.planted import CPU, FOUR_RANKS, GIB, H100, HOST, TWO_NODES, not_ok, only

WORLD = FOUR_RANKS[0]


def test_ranks_are_described() -> None:
    assert TWO_NODES.describe([3, 0, 1]) == "ranks 0-1 on a, 3 on b"
    assert TWO_NODES.describe([2]) == "rank 2 on b"
    assert Places(("a",) * 9).describe([8, 0, 1, 2, 5, 6]) == "ranks 0-2, 5-6, 8"


def test_equal_findings_are_merged() -> None:
    good, other, bad = Check("ok", "x", "1"), Check("ok", "x", "2"), Check("slow", "x", "3", "do")
    assert merge([[good]] * 4, TWO_NODES) == [good]
    assert merge([[good], [other], [good], [good]], TWO_NODES) == [good]
    assert merge([[bad]] * 4, TWO_NODES) == [bad]
    lines = merge([[good], [good], [bad], [bad]], TWO_NODES)
    assert lines == [good, replace(bad, value="3 (ranks 2-3 on b)")]
    assert worst(lines) == "slow" and worst([]) == "ok"


VERSIONS = {"python": "3.11.7", "torch": "2.13.0+cpu", "deepspeed": "0.19.8"}
RANGES = {"python": "<3.14,>=3.10", "torch": ">=2.11,<2.14", "deepspeed": "==0.19.8"}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, None),
        ({"torch": "2.14.0"}, "torch 2.14.0 is not in FGPT's range >=2.11,<2.14"),
        ({"torch": "2.14.0.dev20260101"}, "torch 2.14.0.dev20260101 is not in"),
        ({"torch": "2.12.0+cu126"}, None),
        ({"python": "3.14.1"}, "python 3.14.1 is not in"),
        ({"deepspeed": "0.19.9"}, "deepspeed 0.19.9 is not in"),
        ({"deepspeed": None}, "deepspeed is not installed"),
    ],
)
def test_versions(changed: dict[str, str | None], says: str | None) -> None:
    found = {name: v for name, v in (VERSIONS | changed).items() if v is not None}
    findings = not_ok(judge_versions(found, RANGES))
    assert [check.grade for check in findings] == ["error"] * (says is not None)
    assert all(says in check.value and check.remedy for check in findings)  # type: ignore[operator]


def test_ranges_are_those_of_the_package() -> None:
    ranges = supported_versions()
    assert ranges is not None and set(ranges) >= {"python", *LIBRARIES} - {"triton"}
    assert ranges["deepspeed"].startswith("==")
    assert only(judge_versions(VERSIONS, None)).grade == "warning"


def test_who_differs() -> None:
    assert differing(["x", "y", "y", None]) == ("y", {"x": [0]})
    assert differing(["x", "y"]) == ("x", {"y": [1]})  # rank 0 counts
    assert differing([None, None]) == ("", {})
    check = judge_agreement("code", ["a" * 64] * 3 + ["b" * 64], "copy it", TWO_NODES)
    value = "rank 3 on b: bbbbbbbbbbbb...; the others: aaaaaaaaaaaa..."
    assert check == Check("error", "code", value, "copy it")
    lines = judge_version_agreement([VERSIONS] * 3 + [VERSIONS | {"torch": "2.12.0"}], TWO_NODES)
    assert only(lines).what == "version of torch" and "rank 3 on b: 2.12.0" in lines[0].value
    absent = {"python": "3.11.7", "torch": "2.13.0+cpu"}
    lines = judge_version_agreement([VERSIONS, absent, absent, absent], TWO_NODES)
    assert only(lines).value == "rank 0 on a: 0.19.8; the others: absent"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_healthy_host(kind: str) -> None:
    assert not_ok(judge_host(HOST, WORLD, kind)) == []


@pytest.mark.parametrize(
    ("changed", "world", "grade", "says"),
    [
        ({"shm_free_bytes": 2**26}, WORLD, "warning", "/dev/shm: 64 MiB free of 32 GiB -> NCCL"),
        ({"open_files": 256}, WORLD, "warning", "256, 4 ranks need 288 -> ulimit -n 288"),
        (
            {"open_files": 256, "open_files_hard": 256},
            WORLD,
            "warning",
            "256, 4 ranks need 288 -> raise the hard limit",
        ),
        ({}, World(0, 1024, 0, 8), "warning", "1024, 1024 ranks need 8448"),
        ({"has_infiniband": True}, WORLD, "warning", "8 MiB -> InfiniBand"),
        ({"processes": 128}, WORLD, "warning", "128, 2 ranks need 392"),
        ({"free_memory_bytes": GIB}, WORLD, "warning", "1 GiB available"),
        (
            {"memory_limit_bytes": 4 * GIB, "memory_used_bytes": 3 * GIB},
            WORLD,
            "warning",
            "1 GiB within the control group's limit of 4 GiB",
        ),
        ({"cpu_quota_cores": 2.0}, WORLD, "slow", "8, 2 by quota -> more threads"),
        ({"cores": 1}, WORLD, "slow", "1 for 2 ranks"),
        (
            {"missing_compiler": "no C compiler (gcc): install gcc"},
            WORLD,
            "slow",
            "no C compiler (gcc): blocks are not compiled -> install gcc",
        ),
    ],
)
def test_a_faulty_host(changed: dict[str, Any], world: World, grade: str, says: str) -> None:
    check = only(judge_host(replace(HOST, **changed), world, "cuda"))
    assert check.grade == grade and says in str(check) and check.remedy


def test_a_quota_with_as_many_threads() -> None:
    host = replace(HOST, cpu_quota_cores=2.0, omp_num_threads="1")
    assert not_ok(judge_host(host, WORLD, "cpu")) == []


def test_nodes_with_one_name() -> None:
    other = replace(HOST, network="machine 2", address="10.0.0.2")
    assert node_names([HOST, HOST]) == ("a", "a")
    assert node_names([HOST, other]) == ("a (10.0.0.1)", "a (10.0.0.2)")
    assert node_names([HOST, replace(other, host="b")]) == ("a", "b")


def test_clocks() -> None:
    """Rank 1 is 3 s ahead: one round bounds it within 0.4 s, another one within 0.2 s."""
    zero = [[10.0, 10.3], [11.0, 11.1]]
    ahead = [[13.1, 13.2], [14.0, 14.1]]
    offsets = offsets_from([zero, ahead, zero, zero])
    assert offsets[1] == pytest.approx((2.9, 3.1))
    check = only(judge_clocks(offsets, TWO_NODES))
    assert check.grade == "warning" and "rank 1 on a is 2.9 s ahead of rank 0" in check.value
    behind = offsets_from([ahead, zero, ahead, ahead])
    assert "is 2.9 s behind rank 0" in only(judge_clocks(behind, TWO_NODES)).value
    late = [[10.0, 14.0], [14.0, 19.0]]  # a slow exchange proves nothing
    assert not_ok(judge_clocks(offsets_from([late] * 4), TWO_NODES)) == []


def test_a_healthy_gpu() -> None:
    checks = judge_device(H100)
    assert not_ok(checks) == []
    assert "79 GiB free of 80 GiB, driver 570.124.06" in checks[0].value
    assert checks[1].value == "fp32, fp16, bf16, fp8"
    turing = replace(H100, capability=(7, 5), native_bf16=False)
    assert judge_device(turing)[1].value == "fp32, fp16, bf16 emulated, slower than fp16"


def test_faulty_gpus() -> None:
    check = only(judge_device(replace(H100, free_bytes=40 * GIB)))
    assert check.grade == "warning" and "40 GiB free of 80 GiB" in check.value
    check = only(judge_device(replace(H100, unreachable=(1, 3))))
    assert check.grade == "slow" and "GPU 1, 3" in check.value
    check = only(judge_device(replace(CPU, unused_driver="470.82.01")))
    assert "torch sees no GPU" in check.value
    gpus = [replace(H100, identity=f"GPU-{i}") for i in (0, 1, 1, 2)]
    check = only(judge_sharing(gpus, TWO_NODES))
    assert check.grade == "error" and "one GPU for ranks 1 on a, 2 on b" in check.value
    gpus = [replace(H100, identity=f"GPU-{i}") for i in range(4)]
    gpus[2] = replace(gpus[2], name="NVIDIA H200")
    assert "NVIDIA H200: rank 2 on b" in only(judge_sharing(gpus, TWO_NODES)).value


def test_a_slow_rank_is_named() -> None:
    speeds = [{"fp32": 100e9, "bf16": 200e9, "copy": 9e9} for _ in range(4)]
    assert not_ok(judge_speeds(speeds, [CPU] * 4, TWO_NODES)) == []
    speeds[2] = speeds[2] | {"bf16": 159e9}
    check = only(judge_speeds(speeds, [CPU] * 4, TWO_NODES))
    assert check.grade == "slow" and check.what == "matrix product, bf16"
    assert check.value == "rank 2 on b: 159 GFLOP/s, the median of its kind is 200 GFLOP/s"
    speeds[2] = speeds[2] | {"bf16": 161e9}
    assert not_ok(judge_speeds(speeds, [CPU] * 4, TWO_NODES)) == []
    # of another kind, which has its own median
    other = replace(CPU, name="old")
    speeds[2] = speeds[2] | {"bf16": 50e9}
    assert not_ok(judge_speeds(speeds, [CPU, CPU, other, CPU], TWO_NODES)) == []
    # of two, the faster one is the reference
    two = [{"copy": 9e9}, {"copy": 7e9}]
    assert "rank 1: 7 GB/s" in only(judge_speeds(two, [CPU] * 2, Places(("a", "a")))).value


def test_a_gpu_below_its_data_sheet() -> None:
    speeds = [{"fp32": 50e12, "bf16": 700e12, "copy": 3e12, "upload": 50e9}] * 4
    checks = judge_speeds(speeds, [H100] * 4, TWO_NODES)
    assert not_ok(checks) == []
    assert "of 989 TFLOP/s (NVIDIA H100 data sheet)" in checks[1].value
    throttled = [each | {"bf16": 490e12} for each in speeds]
    findings = not_ok(judge_speeds(throttled, [H100] * 4, TWO_NODES))
    assert len(findings) == 4 and "490 TFLOP/s of 989 TFLOP/s" in findings[0].value


@pytest.mark.parametrize(
    ("name", "fp32", "bf16", "memory"),
    [
        ("NVIDIA A100-SXM4-40GB", 19.5, 312, 1555),
        ("NVIDIA A100-SXM4-80GB", 19.5, 312, 2039),
        ("NVIDIA A100 80GB PCIe", 19.5, 312, 1935),
        ("NVIDIA H100 80GB HBM3", 67, 989, 3350),
        ("NVIDIA H100 PCIe", 51, 756, 2000),
        ("NVIDIA H200", 67, 989, 4800),
        ("NVIDIA B200", 75, 2250, 8000),
        ("NVIDIA L40S", 91.6, 362, 864),
        ("NVIDIA GeForce RTX 4090", 82.6, 165.2, 1008),
        ("AMD Instinct MI300X", 163.4, 1307.4, 5300),
    ],
)
def test_data_sheets(name: str, fp32: float, bf16: float, memory: float) -> None:
    found = {measure: expected_speed(name, measure) for measure in ("fp32", "bf16", "copy")}
    peaks = {measure: each.per_second for measure, each in found.items() if each is not None}
    assert peaks == pytest.approx({"fp32": fp32 * 1e12, "bf16": bf16 * 1e12, "copy": memory * 1e9})
    assert expected_speed(name, "upload") is None


def test_unknown_devices_have_no_data_sheet() -> None:
    for name in ("NVIDIA GB200", "AMD EPYC", "NVIDIA GeForce RTX 3060"):
        assert expected_speed(name, "copy") is None
    assert all(sheet.source for _, sheet in DATA_SHEETS)


def group(kind: str, ranks: tuple[int, ...], rate: float) -> GroupSpeed:
    return GroupSpeed(kind, ranks, {"all-reduce": rate, "all-gather": 5e9}, 20e-6)


def test_a_slow_group_is_named() -> None:
    pairs = [(0, 1), (2, 3)]
    good = [group("tensor", pair, 5e9) for pair in pairs]
    checks = judge_groups(good, TWO_NODES)
    assert not_ok(checks) == [] and "latency 20 us" in checks[0].value
    slow = [good[0], group("tensor", (2, 3), 3.9e9)]
    check = only(judge_groups(slow, TWO_NODES))
    assert check.grade == "slow" and check.what == "tensor-parallel groups (2 of 2 ranks)"
    assert check.value == "all-reduce 3.9 GB/s among ranks 2-3 on b, the median is 5 GB/s"
    # a group within a node is no measure for one over the network
    places = Places(("a", "a", "b", "c"))
    assert not_ok(judge_groups([good[0], group("tensor", (2, 3), 1e9)], places)) == []
    assert judge_groups([], TWO_NODES) == []


def test_every_pair_of_nodes_meets_once() -> None:
    for n in range(1, 8):
        pairs = [pair for pairs in rounds(n) for pair in pairs]
        assert sorted(pairs) == [(a, b) for a in range(n) for b in range(a + 1, n)]
        for each in rounds(n):
            players = [player for pair in each for player in pair]
            assert len(players) == len(set(players))


def links(nodes: str, slow: dict[str, float]) -> dict[tuple[str, str], float]:
    return {(a, b): slow.get(a + b, 1e9) for a in nodes for b in nodes if a != b}


def test_a_slow_link_is_named() -> None:
    three, two = Places(("a", "b", "b", "c")), Places(("a", "b"))
    assert not_ok(judge_links(links("abc", {}), three)) == []
    check = only(judge_links(links("abc", {"ba": 5e7, "bc": 5e7}), three))
    assert check.value == "b sends at 50 MB/s, fast links have 1 GB/s"
    check = only(judge_links(links("abc", {"ab": 5e7, "cb": 5e7}), three))
    assert check.value == "b receives at 50 MB/s, fast links have 1 GB/s"
    both = {"ab": 5e7, "ba": 5e7, "bc": 5e7, "cb": 5e7}
    texts = [check.value for check in not_ok(judge_links(links("abc", both), three))]
    assert [text.partition(" at ")[0] for text in texts] == ["b sends", "b receives"]
    check = only(judge_links(links("ab", {"ba": 5e7}), two))
    assert check.value == "b to a: 50 MB/s, fast links have 1 GB/s"
    # the slowest node is named first, and its links explain no other node's
    rates = {"ba": 5e7, "bc": 5e7, "ca": 4e8}
    texts = [check.value for check in not_ok(judge_links(links("abc", rates), three))]
    assert texts == [
        "b sends at 50 MB/s, fast links have 1 GB/s",
        "c to a: 400 MB/s, fast links have 1 GB/s",
    ]
    assert judge_links({}, Places(("a",))) == []
