"""Facts of healthy machines, of which tests change one."""

from __future__ import annotations

from fgpt.distributed.launch import World
from fgpt.doctor.check import Check, Places
from fgpt.doctor.devices import DeviceFacts
from fgpt.doctor.host import HostFacts

GIB = 2**30
TWO_NODES = Places(("a", "a", "b", "b"))
FOUR_RANKS = tuple(World(rank, 4, rank % 2, 2) for rank in range(4))
HOST = HostFacts(
    host="a",
    network="machine 1",
    address="10.0.0.1",
    cores=8,
    free_memory_bytes=60 * GIB,
    memory_limit_bytes=None,
    memory_used_bytes=0,
    cpu_quota_cores=None,
    omp_num_threads=None,
    shm_bytes=32 * GIB,
    shm_free_bytes=32 * GIB,
    open_files=1024,
    open_files_hard=None,
    locked_bytes=8 * 2**20,
    processes=None,
    has_infiniband=False,
    missing_compiler=None,
)
H100 = DeviceFacts(
    kind="cuda",
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    identity="GPU-0",
    free_bytes=79 * GIB,
    total_bytes=80 * GIB,
    driver="570.124.06",
)
CPU = DeviceFacts(kind="cpu", name="AMD EPYC")


def not_ok(checks: list[Check]) -> list[Check]:
    """The findings."""
    return [check for check in checks if check.grade != "ok"]


def only(checks: list[Check]) -> Check:
    """The only finding."""
    (check,) = not_ok(checks)
    return check
