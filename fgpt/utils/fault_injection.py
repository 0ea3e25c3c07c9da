"""Injected faults, for tests of crashes and full disks (`FGPT_FAULT=point:rank:step:action,...`).

The trainer marks critical points with `fault_point`; the environment variable selects some of them.
Tests of killed processes therefore do not depend on timing.

    points    data, forward, step, before_shards, after_shards, before_manifest, before_set_aside,
              before_rename, before_latest
    actions   kill, term, segv (SIGKILL, SIGTERM, SIGSEGV to itself), exit (at once, with code 3),
              error (an unforeseen one), full (OSError: no space left on device)
"""

from __future__ import annotations

import errno
import os
import signal

VARIABLE = "FGPT_FAULT"


def fault_point(point: str, rank: int, step: int) -> None:
    """Trigger a fault of FGPT_FAULT that names this point, rank and step."""
    plan = os.environ.get(VARIABLE)
    if plan is None:
        return
    for fault in plan.split(","):
        planned_point, planned_rank, planned_step, action = fault.split(":")
        if (planned_point, int(planned_rank), int(planned_step)) == (point, rank, step):
            _act(action, point)


def _act(action: str, point: str) -> None:
    if action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"injected fault at {point}")
    if action == "error":
        raise RuntimeError(f"injected fault at {point}")
    if action == "exit":
        os._exit(3)
    numbers = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "segv": signal.SIGSEGV}
    os.kill(os.getpid(), numbers[action])
