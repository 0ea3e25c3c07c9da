"""Ranks of this machine that a verb starts, rather than a launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import torch


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


def gpus_or(n: int) -> int:
    """The number of GPUs here, or n where there are none."""
    return torch.cuda.device_count() or n


def run_local_ranks(arguments: Sequence[str], n: int) -> int:
    """`fgpt ARGUMENTS` on n ranks; the first exit code that is not 0 ends the others."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "fgpt.cli", *arguments],
            start_new_session=True,  # Ctrl-C is for this process, which ends them
            env=environment,
        )
        for environment in rank_environments(n)
    ]
    try:
        return _first_failure(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _first_failure(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all to end well or for one not to; its code, 128 + the signal that killed it."""
    while True:
        codes = [process.poll() for process in ranks]
        bad = next((code for code in codes if code), None)
        if bad is not None:
            return bad if bad > 0 else 128 - bad
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
