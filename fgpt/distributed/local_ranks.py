"""Ranks on this machine that an `fgpt` verb starts by itself, without a launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fgpt.distributed.launch import (
    World,
    available_cores,
    init_process_group,
    lost_rank_reason,
    shutdown,
)
from fgpt.errors import LostRankError, UserError
from fgpt.utils.process import exit_with_parent

MAX_RANKS = 512
"""Each is a process of some hundred MB."""


def rank_environments(n: int) -> list[dict[str, str]]:
    """Return the environments of n ranks that meet on a free loopback port and share the cores.

    Raises UserError if there are too many for one machine.
    """
    if n > MAX_RANKS:
        raise UserError(f"{n:,} ranks on this machine: at most {MAX_RANKS:,} can be started")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    shared = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "OMP_NUM_THREADS": max(1, available_cores() // n)}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(n)]
    return [loopback | os.environ | {k: str(v) for k, v in rank.items()} for rank in ranks]


def gpu_count_or(default: int) -> int:
    """Return the number of GPUs, or `default` without any."""
    return torch.cuda.device_count() or default


def run_local_ranks(arguments: Sequence[str], n: int) -> int:
    """Run `fgpt ARGUMENTS` on n ranks; the first nonzero exit code ends all and is returned."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "fgpt.cli", *arguments],
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends the ranks
            env=environment,
        )
        for environment in rank_environments(n)
    ]
    try:
        return _wait_for_ranks(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _wait_for_ranks(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Return 0 if all ranks succeed, else the first failure: its code, or 128 + its signal."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return failed if failed > 0 else 128 - failed
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


@contextmanager
def joined_ranks(world: World, kind: str | None = None) -> Iterator[torch.device]:
    """This process as one rank of a verb that has started ranks; gives its device.

    `kind`: see `init_process_group`. Raises LaunchError, and LostRankError where torch reports a
    lost connection.
    """
    exit_with_parent(os.environ)
    device = init_process_group(world, os.environ, kind)
    try:
        yield device
    except RuntimeError as error:
        if reason := lost_rank_reason(error):
            raise LostRankError(f"another rank is gone ({reason})") from error
        raise
    finally:
        shutdown()
