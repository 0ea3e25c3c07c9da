"""Planned faults, for the tests of what survives them (`FGPT_FAULT=point:rank:step:action`).

Tests of killed and failing processes must not depend on sleeping for the right time: the trainer
names its dangerous moments with `fault_point`, and an environment variable chooses one of them.

    points    data, forward, step, before_shards, after_shards, before_manifest, before_rename,
              before_latest
    actions   kill (SIGKILL), term (SIGTERM to oneself), full (OSError: no space left on device)
"""

from __future__ import annotations

import errno
import os
import signal

VARIABLE = "FGPT_FAULT"


def fault_point(point: str, rank: int, step: int) -> None:
    """Do what FGPT_FAULT asks for here, if it names this point, rank and step."""
    plan = os.environ.get(VARIABLE)
    if plan is None:
        return
    at, of_rank, of_step, action = plan.split(":")
    if (at, int(of_rank), int(of_step)) != (point, rank, step):
        return
    if action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"planned fault at {point}")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[action])
