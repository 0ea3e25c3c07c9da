"""Weights and optimizer states on NVMe: checks before a run, removal."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil

from fgpt.config.deepspeed.settings import OPTIMIZER_OFFLOAD, PARAM_OFFLOAD
from fgpt.config.resolve import Resolved
from fgpt.engine.deepspeed.ops import load_operator
from fgpt.errors import LaunchError
from fgpt.model.count import n_params

_PROBE_BYTES = 2**26


def nvme_bytes(resolved: Resolved, share: float) -> dict[Path, int]:
    """The run's own NVMe directories -> bytes that a node with this share of the ranks writes."""
    optimizer, settings = resolved.settings.optimizer, resolved.engine_settings
    assert optimizer is not None  # resolved
    # fp32 master weights, gradients and states
    n_fp32 = 2 + len(optimizer.state_names(resolved.settings.optimizer_params))
    bytes_of = {PARAM_OFFLOAD: resolved.element_bytes, OPTIMIZER_OFFLOAD: 4 * n_fp32}
    needed: Counter[Path] = Counter()
    for section, path in settings.nvme_paths.items():
        needed[Path(path)] += int(bytes_of[section] * n_params(resolved.run.model) * share)
    return needed


def buffer_bytes(resolved: Resolved, local_size: int) -> dict[str, int]:
    """Key of the JSON -> host memory of the buffers that it asks for, of a node's ranks."""
    settings = resolved.engine_settings
    replicas = resolved.batch.dp * resolved.batch.cp
    shard = -(-n_params(resolved.run.model) // replicas)
    group = min(shard, int(settings.get("zero_optimization.sub_group_size")))
    sizes = {
        f"{PARAM_OFFLOAD}.buffer_count": resolved.element_bytes
        * int(settings.get(f"{PARAM_OFFLOAD}.buffer_size")),
        f"{OPTIMIZER_OFFLOAD}.buffer_count": 4 * group,
    }
    return {
        key: int(settings.get(key)) * size * local_size
        for key, size in sizes.items()
        if key.rpartition(".")[0] in settings.nvme_paths
    }


def check_buffers(buffers: Mapping[str, int]) -> None:
    """Raise LaunchError unless this node's memory can hold the buffers (`buffer_bytes`)."""
    free = psutil.virtual_memory().available
    if sum(buffers.values()) > free:
        key = max(buffers, key=lambda name: buffers[name])
        also = " or buffer_size" if key.startswith(PARAM_OFFLOAD) else " or sub_group_size"
        raise LaunchError(
            f"{key}: the buffers need {buffers[key] / 2**30:.1f} GiB of this node's"
            f" {free / 2**30:.1f} GiB of free memory: lower it{also}"
        )


def prepare_nvme(needed_bytes: Mapping[Path, int], report: Callable[[str], None]) -> None:
    """Check library, space and speed of a node's disks, and build DeepSpeed's async_io operator.

    `needed_bytes`: as `nvme_bytes` returns. Raises LaunchError.
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
    for path, size in needed_bytes.items():
        try:
            path.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path).free
            if free < size + _PROBE_BYTES:
                needed = size + _PROBE_BYTES
                raise LaunchError(
                    f"{path}: {free / 2**20:,.0f} MiB free, {needed / 2**20:,.0f} MiB needed:"
                    ' free some, name another nvme_path, or use "device": "cpu"'
                )
            speed = _write_speed(path / f"probe{os.getpid()}")
        except OSError as error:
            raise LaunchError(f"nvme_path {path}: {error.strerror}") from error
        report(
            f"offload to {path}: {size / 2**30:.2f} of {free / 2**30:.1f} free GiB, written at"
            f" {speed / 1e9:.2f} GB/s"
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


def remove_nvme(paths: Iterable[Path]) -> None:
    """Remove the run's files; an error leaves them to the next run of this run directory."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
