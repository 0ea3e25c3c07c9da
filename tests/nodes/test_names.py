"""Hosts whose own name means a loopback address, as Debian's /etc/hosts has it."""

from __future__ import annotations

import pytest

from tests.nodes.conftest import MakeHosts
from tests.nodes.hosts import Hosts, Program, address

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(120)]

MEET = """
import os, sys, torch
import torch.distributed as dist
from fgpt.distributed.launch import (
    hard_exit, init_process_group, shutdown, world_from_environment,
)
from fgpt.errors import LaunchError
world = world_from_environment(os.environ)
try:
    init_process_group(world, os.environ)
except LaunchError as error:
    hard_exit(world.rank, str(error), error.exit_code)
total = torch.tensor(world.rank)
dist.all_reduce(total)
print("total", int(total))
shutdown()
"""


def debian(n: int) -> list[str]:
    """What each of n hosts has in /etc/hosts."""
    lines = [f"{address(i)} node{i}\n" for i in range(n)]
    return [f"127.0.1.1 node{i}\n" + "".join(lines[:i] + lines[i + 1 :]) for i in range(n)]


def meet(hosts: Hosts, **env: str) -> list[Program]:
    """Start two ranks on each host; all add up their numbers."""
    programs, size = [], 2 * len(hosts)
    shared = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "WORLD_SIZE": str(size)}
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
        programs.append(hosts[rank // 2].start(["python", "-c", MEET], shared | place | env))
    return programs


def test_the_interface_that_others_reach(make_hosts: MakeHosts) -> None:
    programs = meet(make_hosts(2, debian(2)))
    assert [program.wait(60) for program in programs] == [0, 0, 0, 0], programs[0].output()
    for rank, program in enumerate(programs):
        said = program.output()
        assert "total 6" in said
        told = f"fgpt: rank {rank}: " if rank else "fgpt: "
        told += f"node{rank // 2}: its own name means a loopback address"
        assert (told in said) == (rank % 2 == 0), said
        assert ("using GLOO_SOCKET_IFNAME=eth0;" in said) == (rank % 2 == 0)


def test_an_interface_that_others_cannot_reach(make_hosts: MakeHosts) -> None:
    programs = meet(make_hosts(2), GLOO_SOCKET_IFNAME="lo")
    assert [program.wait(60) for program in programs] == [2, 2, 2, 2]
    for program in programs:
        assert "GLOO_SOCKET_IFNAME=lo: other hosts cannot reach 127.0.0.1" in program.output()
        assert "export GLOO_SOCKET_IFNAME=eth0, or unset it" in program.output()
