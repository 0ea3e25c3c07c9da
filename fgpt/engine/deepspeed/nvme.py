"""Weights on NVMe: what must be there before a run starts, and what it leaves behind."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from fgpt.engine.deepspeed.ops import load_operator
from fgpt.errors import LaunchError

_PROBE_BYTES = 2**26


def prepare_nvme(path: Path, needed_bytes: int, report: Callable[[str], None]) -> None:
    """Check library, space and speed of a node's disk, and build DeepSpeed's async_io operator.

    `path`: the run's own directory; `needed_bytes`: of the node's weights. Raises LaunchError.
    """
    # 1. the library that the operator is linked with
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if not builder.is_compatible(verbose=False):
        raise LaunchError(
            "offload to nvme needs libaio: install libaio-dev (Debian, Ubuntu) or libaio-devel (Red"
            ' Hat), or use "device": "cpu"'
        )
    load_operator("AsyncIOBuilder", report)
    # 2. space and speed
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
        if free < needed_bytes + _PROBE_BYTES:
            raise LaunchError(
                f"{path}: {free / 2**30:.1f} GiB free, {needed_bytes / 2**30:.1f} GiB needed for"
                ' the weights: free some, name another nvme_path, or use "device": "cpu"'
            )
        write_speed = _write_speed(path / f"probe{os.getpid()}")
    except OSError as error:
        raise LaunchError(f"nvme_path {path}: {error.strerror}") from error
    report(
        f"weights on {path}: {needed_bytes / 2**30:.2f} of {free / 2**30:.1f} free GiB, written at"
        f" {write_speed / 1e9:.2f} GB/s"
    )


def _write_speed(path: Path) -> float:
    """Bytes per second of writing and syncing a file, which is removed again."""
    data = os.urandom(_PROBE_BYTES)
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)


def remove_nvme(path: Path) -> None:
    """Remove the run's files; an error leaves them to the next run of this run directory."""
    shutil.rmtree(path, ignore_errors=True)
