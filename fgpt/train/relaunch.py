"""Whether a launcher has restarted this run: torchrun --max-restarts, or a requeue by Slurm.

A restarted run has the command line of its first start, so `--resume none`, the default, would move
away what the first start has trained. RUN_DIR/launch.json therefore names the launch that began the
run there; a later start of the same launch goes on with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from fgpt.distributed.agreements import gather_json
from fgpt.utils.files import read_regular
from fgpt.utils.process import process_key

FILE = "launch.json"


def describe_launch(environ: Mapping[str, str], device: torch.device) -> dict[str, Any]:
    """Return what tells a restart of this launch from another launch; all ranks call it.

    torchrun: the processes that start the ranks, one per node; they live as long as the launch.
    Slurm: job and step, the same after a requeue, and the number of requeues.
    """
    starters = gather_json(_torchrun_process(environ), device)
    launch: dict[str, Any] = {"torchrun": sorted({key for key in starters if key is not None})}
    if "SLURM_JOB_ID" in environ:
        launch["slurm"] = {
            "job": environ["SLURM_JOB_ID"],
            "step": environ.get("SLURM_STEP_ID", ""),
            "requeues": int(environ.get("SLURM_RESTART_COUNT") or 0),
        }
    return launch


def restarted_by(launch: Mapping[str, Any], run_dir: Path) -> str | None:
    """Return who has restarted the run of this directory; None: this launch did not begin it."""
    try:
        earlier = json.loads(read_regular(run_dir / FILE))
        if {*launch["torchrun"]} & {*earlier["torchrun"]}:
            return "torchrun"
        now, then = launch.get("slurm"), earlier.get("slurm")
        if now and then and now["requeues"] > then["requeues"]:
            return "Slurm" if all(now[name] == then[name] for name in ("job", "step")) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # no run, one of an earlier FGPT, or a damaged file: as if begun by another launch
    return None


def _torchrun_process(environ: Mapping[str, str]) -> str | None:
    """This rank's torchrun; None under another launcher."""
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    try:
        return process_key(os.getppid())
    except (OSError, psutil.Error):
        return None
