"""The run directory's disk: free space, and whether all nodes have the same one."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from fgpt.distributed.agreements import gather_json, run_on_rank0
from fgpt.distributed.launch import World
from fgpt.doctor.check import Check, Places, size_text

PROBE_S = 10.0
"""Time for a new file to appear on the other nodes, in seconds: network file systems cache."""
SPARE_BYTES = 2**30
"""Free space that a run of unknown size should find."""


def nearest_existing(path: Path) -> Path:
    """`path`, or its nearest parent that exists; absolute."""
    path = Path(os.path.abspath(path))
    while not os.path.exists(path):
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Free space of the file system that would hold `path`, in bytes. Raises OSError."""
    return shutil.disk_usage(nearest_existing(path)).free


def judge_free_disk(path: Path, free: int, needed: int | None) -> Check:
    """`needed`: bytes of the checkpoints that the run will write; None: unknown."""
    value = f"{size_text(free)} at {nearest_existing(path)}"
    remedy = "free some, or name another --run_dir"
    if needed is not None:
        value += f", the run's checkpoints need {size_text(needed)}"
        remedy += ", or keep fewer checkpoints (checkpoint.keep)"
    if free >= (SPARE_BYTES if needed is None else needed):
        return Check("ok", "free disk", value)
    return Check("warning", "free disk", value, remedy)


def probe_shared(
    path: Path, world: World, device: torch.device, wait_s: float = PROBE_S
) -> list[bool]:
    """Whether each rank reads what rank 0 writes beside or in `path`. All ranks call this.

    Rank 0 writes a random token into a new file, which it removes. One rank per node looks; the
    others count as seeing it. Raises TrainingError, on all ranks, if rank 0 cannot write.
    """
    token = uuid.uuid4().hex
    here = Path(os.path.abspath(path))

    def write() -> list[object]:
        folder = nearest_existing(path)
        with open(folder / f".fgpt_shared_{token}", "x") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
        return [len(here.parts) - len(folder.parts), token]

    levels, token = run_on_rank0(write, device)
    name = f".fgpt_shared_{token}"
    folder = here if levels == 0 else here.parents[levels - 1]  # this node's, if paths differ
    try:
        seen = world.local_rank > 0 or _reads(folder / name, token, wait_s)
        return [bool(each) for each in gather_json(seen, device)]
    finally:
        if world.is_rank0:
            (folder / name).unlink(missing_ok=True)


def _reads(path: Path, token: str, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            if path.read_text() == token:
                return True
        except OSError:
            pass  # not there yet
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def judge_shared(path: Path, seen: Sequence[bool], places: Places) -> Check:
    """A run writes each rank's files into one directory, or no resume finds them all."""
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if blind:
        value = f"{path} of {places.describe(blind)} is not rank 0's"
        remedy = "name a --run_dir on a file system that all nodes share, by the same path"
        return Check("error", "run directory", value, remedy)
    shared = "one node" if len(places.distinct) == 1 else "shared by all nodes"
    return Check("ok", "run directory", f"{path}, writable, {shared}")
