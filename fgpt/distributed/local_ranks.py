"""Ranks of this machine that a verb starts, rather than a launcher."""

from __future__ import annotations

import os
import socket
import sys


def rank_environments(n: int) -> list[dict[str, str]]:
    """The environments of n ranks that meet on a free port of loopback and share the cores."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    shared = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "OMP_NUM_THREADS": max(1, cores // n)}
    places = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(n)]
    return [
        loopback | os.environ | {k: str(v) for k, v in (shared | place).items()} for place in places
    ]
