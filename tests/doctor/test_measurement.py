"""Measurements on planted machines and between ranks."""

from __future__ import annotations

import os
import shutil
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import fgpt
from fgpt.distributed.launch import World
from fgpt.doctor import groups as groups_module
from fgpt.doctor import links as links_module
from fgpt.doctor import software
from fgpt.doctor.check import Places
from fgpt.doctor.clock import measure_clocks
from fgpt.doctor.devices import measure_speeds
from fgpt.doctor.disk import judge_free_disk, judge_shared, nearest_existing, probe_shared
from fgpt.doctor.examine import judge_port
from fgpt.doctor.groups import measure_groups
from fgpt.doctor.host import ControlGroup, control_group, host_facts
from fgpt.doctor.links import measure_links
from fgpt.errors import TrainingError
from fgpt.parallel.topology import Grid
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def planted(folder: Path, membership: str, files: dict[str, str]) -> ControlGroup:
    """What `control_group` finds in these files."""
    (folder / "membership").write_text(membership)
    for name, text in files.items():
        file = folder / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return control_group(folder / "mount", folder / "membership")


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    files = {
        "slurm/job/memory.max": "max",
        "slurm/job/cpu.max": "max 100000",
        "slurm/memory.max": str(2**30),
        "slurm/memory.current": "1000",
        "slurm/cpu.max": "150000 100000",
        "memory.max": str(2**31),
    }
    group = planted(tmp_path, "0::/slurm/job\n", files)
    assert group == ControlGroup(2**30, 1000, 1.5)


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    files = {
        "memory/docker/memory.limit_in_bytes": str(2**30),
        "memory/docker/memory.usage_in_bytes": "5",
        "cpu,cpuacct/docker/cpu.cfs_quota_us": "200000",
        "cpu,cpuacct/docker/cpu.cfs_period_us": "100000",
    }
    membership = "4:memory:/docker\n3:cpu,cpuacct:/docker\n1:name=systemd:/\n"
    assert planted(tmp_path, membership, files) == ControlGroup(2**30, 5, 2.0)
    files["memory/docker/memory.limit_in_bytes"] = "9223372036854771712"
    files["cpu,cpuacct/docker/cpu.cfs_quota_us"] = "-1"
    assert planted(tmp_path, membership, files) == ControlGroup(None, 0, None)


def test_no_control_group(tmp_path: Path) -> None:
    assert control_group(tmp_path, tmp_path / "absent") == ControlGroup()


def test_this_machine() -> None:
    facts = host_facts("cpu")
    assert facts.host == socket.gethostname() and facts.free_memory_bytes > 2**20
    assert facts.cores == len(os.sched_getaffinity(0))


def test_the_hash_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "fgpt"
    shutil.copytree(Path(fgpt.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so"))
    own = software.code_hash()
    monkeypatch.setattr(fgpt, "__file__", str(copy / "__init__.py"))
    assert software.code_hash() == own
    (copy / "notes.txt").touch()
    assert software.code_hash() == own
    changed = copy / "config" / "batch.py"
    changed.write_text(changed.read_text() + "\n")
    assert software.code_hash() != own


def test_speeds_of_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgpt.doctor.devices.TIMED_S", 0.01)
    speeds = measure_speeds(CPU)
    assert set(speeds) == {"fp32", "bf16", "copy"}
    assert all(1e7 < value < 1e15 for value in speeds.values())


def test_a_port() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        grade, _, value, remedy = judge_port(port, {})
    assert grade == "warning" and f"{port} cannot be bound: Address already in use" in value
    assert "--master_port" in remedy
    assert judge_port(port, {})[0] == "ok"
    met = judge_port(None, {"MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert met[2] == "the ranks met at a:1"


def test_free_disk(tmp_path: Path) -> None:
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    gib = 2**30
    assert judge_free_disk(tmp_path, 10 * gib, None).grade == "ok"
    assert judge_free_disk(tmp_path, gib // 2, None).grade == "warning"
    assert judge_free_disk(tmp_path, gib // 2, gib // 4).grade == "ok"
    short = judge_free_disk(tmp_path, 10 * gib, 11 * gib)
    assert short.grade == "warning" and "checkpoints need 11 GiB" in short.value
    assert judge_free_disk(tmp_path, 10 * gib, 9 * gib).grade == "ok"


@pytest.mark.dist
def test_between_ranks(tmp_path: Path) -> None:
    for name in "01":
        (tmp_path / name).mkdir()
    first, second = run_ranks(_measure, 2, str(tmp_path))
    assert first["clocks"] == second["clocks"]
    low, high = first["clocks"][1]
    assert 29.5 < low <= 30.0 <= high < 30.5
    assert [first["shared"], first["apart"], first["relative"]] == [
        [True, True],
        [True, False],
        [True, True],
    ]
    assert "new/run of rank 1" in first["said"] and "is not rank 0's" in first["said"]
    assert all("Not a directory" in each["unwritable"] for each in (first, second))
    assert first["links"].keys() == {("a", "b"), ("b", "a")}
    assert all(1e5 < rate < 1e12 for rate in first["links"].values())
    kinds = [(speed.kind, speed.ranks) for speed in first["groups"]]
    assert kinds == [("tensor", (0, 1))] and first["groups"] == second["groups"]
    speeds = first["groups"][0]
    assert speeds.latency_s < 1 and all(rate > 1e5 for rate in speeds.bytes_per_s.values())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0", "1", "file"]


def _measure(world: World, folder: str) -> dict[str, Any]:
    links_module.LAST_BYTES = 2**18
    groups_module.LAST_BYTES["cpu"] = 2**18  # type: ignore[index]
    node = World(world.rank, world.size, local_rank=0, local_size=1)
    found: dict[str, Any] = {}
    # the clock of rank 1 is half a minute ahead
    found["clocks"] = measure_clocks(CPU, lambda: time.time() + 30 * world.rank)
    found["shared"] = probe_shared(Path(folder) / "new" / "run", node, CPU, 5)
    os.chdir(Path(folder) / str(world.rank))
    found["relative"] = probe_shared(Path("../new/run"), node, CPU, 5)
    apart = Path("new/run")
    found["apart"] = probe_shared(apart, node, CPU, 0.2)
    found["said"] = judge_shared(apart, found["apart"], Places(("a", "a"))).value
    (Path(folder) / "file").touch()
    try:
        probe_shared(Path(folder) / "file" / "run", node, CPU, 5)
    except TrainingError as error:
        found["unwritable"] = str(error)
    found["links"] = measure_links(world, CPU, Places(("a", "b")))
    found["groups"] = measure_groups(Grid(tp=2), world, CPU, timedelta(seconds=30))
    return found
