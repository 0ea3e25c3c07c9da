"""A rank exits after another rank's death even where torch reports nothing."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fgpt.distributed import peers
from fgpt.distributed.launch import World
from fgpt.utils.process import exit_with_parent
from tests.ranks import start_ranks, wait_until

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(sys.platform != "linux", reason="pidfd is Linux's"),
]
CPU = torch.device("cpu")


def wait_for_a_dead_rank(world: World) -> None:
    """Rank 1 dies; rank 0 waits for it in a new group, rank 2 asleep, both for an hour."""
    with peers.watch_peers(world, CPU):
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if world.rank == 0:
            dist.new_group([0, 1], timeout=timedelta(hours=1))
        time.sleep(3600)


def test_a_death_ends_those_who_wait() -> None:
    with start_ranks(wait_for_a_dead_rank, 3) as ranks:
        wait_until(lambda: not ranks.processes[1].is_alive(), 60, "the kill")
        t0 = time.monotonic()
        assert ranks.wait(30) == [1, -signal.SIGKILL, 1], ranks.output()
        assert peers.GRACE_S - 1 < time.monotonic() - t0
        assert ranks.output(0) == "fgpt: another rank is gone (rank 1)\n"
        said = ranks.output(2).splitlines()
        assert said == ["fgpt: rank 2: another rank is gone (rank 1)"]


def leave_one_after_the_other(world: World) -> str:
    """Rank 1 leaves and exits, then rank 0 leaves, and exits much later."""
    peers.GRACE_S = 2.0
    with peers.watch_peers(world, CPU):
        time.sleep(0.5 * (1 - world.rank))
    time.sleep(3.0 * (1 - world.rank))
    return "left"


def test_who_leaves_in_order_ends_nobody() -> None:
    with start_ranks(leave_one_after_the_other, 2) as ranks:
        assert ranks.wait(30) == [0, 0], ranks.output()
        assert ranks.results() == ["left", "left"]


def enter_often(world: World) -> list[tuple[int, int]]:
    """Return the number of threads and open files after each of four watches."""
    counts = []
    for _ in range(4):
        with peers.watch_peers(world, CPU):
            pass
        counts.append((threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))))
    return counts


def test_nothing_is_left_of_a_watch() -> None:
    with start_ranks(enter_often, 2) as ranks:
        assert ranks.wait(30) == [0, 0], ranks.output()
        for first, *others in ranks.results():
            assert others == [first] * 3


def train_without_pidfd(world: World) -> str:
    """As on Linux before 5.3, and where seccomp forbids it."""

    def refused(pid: int, flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    os.pidfd_open = refused  # type: ignore[assignment]
    exit_with_parent(os.environ)
    with peers.watch_peers(world, CPU):
        dist.barrier()
    return "went on"


def test_without_pidfd_nothing_is_watched() -> None:
    with start_ranks(train_without_pidfd, 2) as ranks:
        assert ranks.wait(30) == [0, 0], ranks.output()
        assert ranks.results() == ["went on", "went on"]
