"""A rank ends when another one on its machine has died, also where nobody else says so (Linux).

Ranks that exchange data notice at once. Those that wait for the dead one in a process group that is
being made, or in NCCL, would wait for that group's timeout, and deaf to signals: a thread waits for
the ends of the other processes.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from fgpt.distributed.agreements import gather_json
from fgpt.distributed.launch import World, hard_exit
from fgpt.errors import LostRankError

GRACE_S = 5.0
"""How long the main thread may take to notice by itself: it has more to say."""


@contextlib.contextmanager
def watch_peers(world: World, device: torch.device) -> Iterator[None]:
    """Inside, this process ends with a line and code 1, GRACE_S after another rank's process has.

    All ranks enter together. They may end inside at different times, but less than GRACE_S apart.
    """
    others = _others(world, device)
    with contextlib.ExitStack() as at_the_end:
        ends = {}
        for pid, rank in others.items():
            with contextlib.suppress(OSError):  # some containers forbid it
                ends[end := os.pidfd_open(pid)] = rank
                at_the_end.callback(os.close, end)
        over, say_so = os.pipe()
        at_the_end.callback(os.close, over)
        watch = threading.Thread(target=_watch, args=(world.rank, ends, over), daemon=True)
        watch.start()
        at_the_end.callback(watch.join)
        at_the_end.callback(os.close, say_so)
        yield


def _others(world: World, device: torch.device) -> dict[int, int]:
    """Process -> rank of the other ranks that this one can see the end of."""
    places = gather_json([_machine(), os.getpid()], device)
    return {
        pid: rank
        for rank, (machine, pid) in enumerate(places)
        if rank != world.rank and machine is not None and machine == places[world.rank][0]
    }


def _machine() -> str | None:
    """What processes have in common that know each other by number; None if that is not known."""
    if sys.platform != "linux":
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _watch(rank: int, ends: Mapping[int, int], over: int) -> None:
    """End this process GRACE_S after one of `ends` (descriptor -> rank), unless it is `over`."""
    poll = select.poll()
    for descriptor in (*ends, over):
        poll.register(descriptor, select.POLLIN)
    first, _ = poll.poll()[0]
    if first == over or select.select([over], [], [], GRACE_S)[0]:
        return
    hard_exit(rank, f"another rank is gone (rank {ends[first]})", LostRankError.exit_code)
