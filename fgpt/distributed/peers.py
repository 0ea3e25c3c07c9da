"""Watches the other ranks of this machine, and exits when one of them dies (Linux only).

Ranks in a collective notice a dead peer at once. Ranks that wait for it in NCCL, or while a process
group is being created, would wait for the timeout and ignore signals; so a thread watches.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

import psutil
import torch

from fgpt.distributed.agreements import gather_json
from fgpt.distributed.launch import World, hard_exit
from fgpt.errors import LostRankError

GRACE_S = 5.0
"""Time for the main thread to notice by itself and report more, in seconds."""
TELL_S = 0.3
"""Time to leave after a rank that left in order, in seconds."""


def lost_rank(rank: int) -> str:
    """Return what is said of a rank that has died."""
    return f"another rank is gone (rank {rank})"


@contextlib.contextmanager
def watch_peers(
    world: World,
    device: torch.device,
    leave: Callable[[str], NoReturn] | None = None,
    tell: Callable[[int], None] = lambda rank: None,
) -> Iterator[Callable[[], None]]:
    """Inside, exit with code 1 GRACE_S after another local rank has died.

    All ranks enter together, and leave less than GRACE_S apart. `leave` exits with a reason; `tell`
    is called before, with the dead rank, for the ranks of other hosts. Gives a function that kills
    the local ranks that are stopped (SIGSTOP): they handle no other signal.
    """
    peers = _local_peers(world, device)
    with contextlib.ExitStack() as cleanup:
        # 1. a descriptor for each peer becomes readable when that process ends
        rank_by_descriptor, pid_by_descriptor = {}, {}
        for pid, rank in peers.items():
            with contextlib.suppress(OSError):  # some containers forbid it
                rank_by_descriptor[descriptor := os.pidfd_open(pid)] = rank
                pid_by_descriptor[descriptor] = pid
                cleanup.callback(os.close, descriptor)
        # 2. a pipe: closing the write end tells the thread to return
        stop_read, stop_write = os.pipe()
        cleanup.callback(os.close, stop_read)
        arguments = (rank_by_descriptor, stop_read, leave or partial(_leave, world.rank), tell)
        thread = threading.Thread(target=_watch, args=arguments, daemon=True)
        thread.start()
        # 3. callbacks run in reverse: stop the thread, join it, close the descriptors
        cleanup.callback(thread.join)
        cleanup.callback(os.close, stop_write)
        yield partial(_kill_stopped, pid_by_descriptor)


def _local_peers(world: World, device: torch.device) -> dict[int, int]:
    """Return pid -> rank of the other ranks in this PID namespace."""
    processes = gather_json([_pid_namespace(), os.getpid()], device)
    return {
        pid: rank
        for rank, (namespace, pid) in enumerate(processes)
        if rank != world.rank and namespace is not None and namespace == processes[world.rank][0]
    }


def _pid_namespace() -> str | None:
    """Return an identifier shared by processes that see each other's pids; None if unknown."""
    if sys.platform != "linux":
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _kill_stopped(pid_by_descriptor: Mapping[int, int]) -> None:
    for descriptor, pid in pid_by_descriptor.items():
        with contextlib.suppress(OSError, psutil.Error):
            if psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)  # never a reused pid


def _leave(rank: int, reason: str) -> NoReturn:
    hard_exit(rank, reason, LostRankError.exit_code)


def _watch(
    rank_by_descriptor: Mapping[int, int],
    stop: int,
    leave: Callable[[str], NoReturn],
    tell: Callable[[int], None],
) -> None:
    """Wait for a peer's end or for `stop`; after a peer's end, exit unless stopped in GRACE_S."""
    poll = select.poll()
    for descriptor in (*rank_by_descriptor, stop):
        poll.register(descriptor, select.POLLIN)
    ready, _ = poll.poll()[0]
    if ready == stop or select.select([stop], [], [], TELL_S)[0]:
        return
    lost = rank_by_descriptor[ready]
    tell(lost)
    if not select.select([stop], [], [], GRACE_S - TELL_S)[0]:
        leave(lost_rank(lost))
