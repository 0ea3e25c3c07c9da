"""The machine of one rank: limits, control groups, shared memory, compiler; what they mean."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fgpt.distributed.launch import World, available_cores
from fgpt.doctor.check import Check, size_text
from fgpt.utils.compiler import missing_compiler

SHM_BYTES_PER_RANK = 64 * 2**20
"""NCCL's buffers in /dev/shm for one rank of a node; a container has 64 MiB by default."""
FILES_PER_RANK = 8
"""Descriptors for a connection to another rank, over its sockets and its store."""
FILES_OF_ITS_OWN = 256
"""Descriptors of a rank without any other: libraries, data, checkpoints."""
THREADS_PER_RANK = 64
"""Threads of a rank besides those of its cores: gloo, NCCL, torch's autograd, data."""
FREE_MEMORY_BYTES = 2 * 2**30
"""Host memory of one rank: torch, DeepSpeed, and a small model."""


@dataclass(frozen=True)
class ControlGroup:
    """What the control groups of this process (its container, its Slurm job) allow."""

    memory_bytes: int | None = None
    """Limit of memory; None: none."""
    used_bytes: int = 0
    """Memory in use in the group with that limit."""
    cores: float | None = None
    """CPU time per second, in cores; None: no quota."""


@dataclass(frozen=True)
class HostFacts:
    """What a rank knows of its machine. Fields are JSON values."""

    host: str
    """Host name."""
    network: str
    """The same for processes that share a network: machine and network namespace."""
    address: str
    """IPv4 address on the first interface that is not loopback; empty without one."""
    cores: int
    """CPU cores that this process may use."""
    free_memory_bytes: int
    """Memory that is available on the machine."""
    memory_limit_bytes: int | None
    memory_used_bytes: int
    cpu_quota_cores: float | None
    """See `ControlGroup`."""
    omp_num_threads: str | None
    """The variable of that name, which sets the threads of each rank."""
    shm_bytes: int | None
    """Size of /dev/shm; None without it."""
    shm_free_bytes: int
    open_files: int | None
    """Soft RLIMIT_NOFILE; None: unlimited."""
    open_files_hard: int | None
    locked_bytes: int | None
    """Soft RLIMIT_MEMLOCK; None: unlimited."""
    processes: int | None
    """Soft RLIMIT_NPROC, which counts the user's threads; None: unlimited."""
    has_infiniband: bool
    """The machine has InfiniBand or RoCE adapters."""
    missing_compiler: str | None
    """See `utils.compiler`."""


def host_facts(device_kind: str) -> HostFacts:
    """Examine this machine, for ranks on `device_kind` (cpu or cuda). Starts nothing."""
    group = control_group()
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    files, files_hard = _limits(resource.RLIMIT_NOFILE)
    return HostFacts(
        host=socket.gethostname(),
        network=_network(),
        address=_address(),
        cores=available_cores(),
        free_memory_bytes=int(psutil.virtual_memory().available),
        memory_limit_bytes=group.memory_bytes,
        memory_used_bytes=group.used_bytes,
        cpu_quota_cores=group.cores,
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        shm_bytes=None if shm is None else shm.total,
        shm_free_bytes=0 if shm is None else shm.free,
        open_files=files,
        open_files_hard=files_hard,
        locked_bytes=_limits(resource.RLIMIT_MEMLOCK)[0],
        processes=_limits(resource.RLIMIT_NPROC)[0],
        has_infiniband=any(Path("/sys/class/infiniband").glob("*")),
        missing_compiler=missing_compiler(device_kind),
    )


def node_names(facts: Sequence[HostFacts]) -> tuple[str, ...]:
    """Name of each rank's node: its host name, with its address where nodes have the same name."""
    networks_by_host: dict[str, set[str]] = {}
    for each in facts:
        networks_by_host.setdefault(each.host, set()).add(each.network)
    return tuple(
        each.host
        if len(networks_by_host[each.host]) == 1
        else f"{each.host} ({each.address or each.network})"
        for each in facts
    )


def control_group(
    mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> ControlGroup:
    """The tightest limits of the groups that this process is in; those of versions 1 and 2."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:  # not Linux
        return ControlGroup()
    memory: list[tuple[int, int]] = []  # limit, use
    cores = []
    for _, controllers, path in lines:
        for folder in _groups(mount, controllers, path):
            limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
            if limit is not None:
                used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
                memory.append((limit, used or 0))
            cores += _cores(folder)
    quota = min(cores, default=None)
    limit, used_bytes = min(memory, default=(None, 0))
    if limit is None or limit >= psutil.virtual_memory().total:
        return ControlGroup(cores=quota)  # version 1 writes a number near 2^63 for "no limit"
    return ControlGroup(limit, used_bytes, quota)


def _groups(mount: Path, controllers: str, path: str) -> list[Path]:
    """The folders of a group and its parents; in a container the group may be the mount itself."""
    root = mount / controllers if controllers else mount
    folder = root / path.lstrip("/")
    return [each for each in (folder, *folder.parents) if each == root or root in each.parents]


def _cores(folder: Path) -> list[float]:
    """The CPU quota of a group, in cores, if it has one."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return [] if quota == "max" else [int(quota) / int(period)]
    except (OSError, ValueError):
        quota_us = _number(folder / "cpu.cfs_quota_us")
        period_us = _number(folder / "cpu.cfs_period_us")
        return [quota_us / period_us] if quota_us and period_us and quota_us > 0 else []


def _number(*paths: Path) -> int | None:
    """The number in the first of the files that has one."""
    for path in paths:
        try:
            return int(path.read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _limits(which: int) -> tuple[int | None, int | None]:
    """The soft and the hard limit; None: unlimited."""
    soft, hard = resource.getrlimit(which)
    unlimited = resource.RLIM_INFINITY
    return (None if soft == unlimited else soft), (None if hard == unlimited else hard)


def _network() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def _address() -> str:
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET and not re.match(r"lo\d*$|docker", name):
                return str(each.address)
    return ""


def judge_host(facts: HostFacts, world: World, device_kind: str) -> list[Check]:
    """What a machine's limits mean for one of its ranks."""
    return [
        _judge_compiler(facts, device_kind),
        judge_shm(facts, world, device_kind),
        judge_open_files(facts, world),
        _judge_locked_memory(facts),
        _judge_processes(facts, world),
        _judge_memory(facts, world),
        _judge_cores(facts, world),
    ]


def _judge_compiler(facts: HostFacts, device_kind: str) -> Check:
    what = "C compiler and Python.h"
    if facts.missing_compiler is None:
        return Check("ok", what, "both found")
    missing, _, remedy = facts.missing_compiler.partition(": ")
    if device_kind == "cpu":
        unused = "only speed.compile blocks and DeepSpeed's own optimizers need it on a CPU"
        return Check("ok", what, f"{missing}; {unused}")
    return Check("slow", what, f"{missing}: blocks are not compiled", remedy)


def judge_shm(facts: HostFacts, world: World, device_kind: str) -> Check:
    """/dev/shm, through which NCCL's ranks of one node exchange data."""
    if facts.shm_bytes is None:
        return Check("ok", "/dev/shm", "none on this system")
    value = f"{size_text(facts.shm_free_bytes)} free of {size_text(facts.shm_bytes)}"
    needed = SHM_BYTES_PER_RANK * world.local_size
    if device_kind == "cpu" or world.local_size == 1 or facts.shm_free_bytes >= needed:
        return Check("ok", "/dev/shm", value)
    remedy = f"NCCL may need {size_text(needed)}: start the container with --shm-size=1g"
    return Check("warning", "/dev/shm", value, remedy)


def judge_open_files(facts: HostFacts, world: World) -> Check:
    """Sockets and files that one rank may open."""
    what, limit = "open files (ulimit -n)", facts.open_files
    needed = FILES_OF_ITS_OWN + FILES_PER_RANK * world.size
    if limit is None or limit >= needed:
        return Check("ok", what, _limit_text(limit))
    hard = facts.open_files_hard
    allowed = f"ulimit -n {needed}" if hard is None or hard >= needed else "raise the hard limit"
    return Check("warning", what, f"{limit}, {world.size} ranks need {needed}", allowed)


def _judge_locked_memory(facts: HostFacts) -> Check:
    what, limit = "locked memory (ulimit -l)", facts.locked_bytes
    value = "unlimited" if limit is None else size_text(limit)
    if limit is None or not facts.has_infiniband:
        return Check("ok", what, value)
    remedy = "InfiniBand registers its buffers: ulimit -l unlimited"
    return Check("warning", what, value, remedy)


def _judge_processes(facts: HostFacts, world: World) -> Check:
    what, limit = "processes and threads (ulimit -u)", facts.processes
    needed = (THREADS_PER_RANK + facts.cores // world.local_size) * world.local_size + 256
    if limit is None or limit >= needed:
        return Check("ok", what, _limit_text(limit))
    value = f"{limit}, {world.local_size} ranks need {needed}"
    return Check("warning", what, value, f"ulimit -u {needed}")


def _judge_memory(facts: HostFacts, world: World) -> Check:
    """Memory for this node's ranks: of the machine, or what the control group leaves of it."""
    free, value = facts.free_memory_bytes, f"{size_text(facts.free_memory_bytes)} available"
    if facts.memory_limit_bytes is not None:
        free = min(free, facts.memory_limit_bytes - facts.memory_used_bytes)
        limit = size_text(facts.memory_limit_bytes)
        value += f", {size_text(max(free, 0))} within the control group's limit of {limit}"
    if free >= FREE_MEMORY_BYTES * world.local_size:
        return Check("ok", "host memory", value)
    remedy = f"end other processes, or raise the limit: {world.local_size} ranks need about"
    remedy += f" {size_text(FREE_MEMORY_BYTES * world.local_size)}"
    return Check("warning", "host memory", value, remedy)


def _judge_cores(facts: HostFacts, world: World) -> Check:
    quota = facts.cpu_quota_cores
    value = f"{facts.cores}" + ("" if quota is None else f", {quota:g} by quota")
    threads = int(quota or facts.cores) // world.local_size
    if quota is not None and quota < facts.cores and facts.omp_num_threads is None:
        remedy = f"more threads than that are throttled: OMP_NUM_THREADS={max(1, threads)}"
        return Check("slow", "CPU cores", value, remedy)
    if min(facts.cores, quota or facts.cores) < world.local_size:
        remedy = "start fewer ranks per node, or grant more cores"
        return Check("slow", "CPU cores", f"{value} for {world.local_size} ranks", remedy)
    return Check("ok", "CPU cores", value)


def _limit_text(limit: int | None) -> str:
    return "unlimited" if limit is None else str(limit)
