"""The environment of a measurement (hardware, peak, versions), and files of JSON records."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fgpt.engine.base import DTYPES
from fgpt.errors import UserError
from fgpt.model.cpu_features import prefers_onednn
from fgpt.model.linear import onednn_linear
from fgpt.plan.hardware import peak_tflops
from fgpt.utils.files import check_writable

PACKAGES = ("torch", "deepspeed", "numpy")
PEAK_SIDE = 2048
"""Rows and columns of the matrices that a CPU's peak is measured with."""
PEAK_TRIES = 5


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and command of this process."""
    return {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["fgpt", *map(_strip_folder, sys.argv[1:])],
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "source": source_hash(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def hardware(device: torch.device) -> str:
    """Name of the device; for a CPU with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].partition(":")[2].strip() if models else name
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{name}, {cores} cores"


def source_hash() -> str:
    """Hash of the package's Python files and of ds_configs/bench."""
    package = Path(__file__).parents[1]
    files = [*package.rglob("*.py"), *(package.parent / "ds_configs/bench").glob("*.json")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def measure_peak(device: torch.device, precision: str) -> tuple[float | None, str | None]:
    """Peak TFLOP/s of one device (a CPU: all its cores) for the MFU, and the source of the figure.

    A GPU's is its vendor's; a CPU's is the fastest matrix product measured now.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return peak_tflops(name, precision), f"{name}, dense 16-bit peak by its vendor"
    x, weight = (torch.randn(PEAK_SIDE, PEAK_SIDE).to(DTYPES[precision]) for _ in range(2))
    products = [F.linear, *([onednn_linear] if prefers_onednn() else [])]
    with torch.no_grad():
        best_s = min(_fastest_s(partial(product, x, weight)) for product in products)
    size = f"{PEAK_SIDE} x {PEAK_SIDE}"
    source = f"fastest of {PEAK_TRIES} products of {size} matrices measured here"
    return 2 * PEAK_SIDE**3 / best_s / 1e12, source


def _fastest_s(product: Callable[[], Tensor]) -> float:
    """Seconds of the fastest try, after one warmup call."""
    product()
    seconds = []
    for _ in range(PEAK_TRIES):
        t0 = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - t0)
    return min(seconds)


def must_be_writable(path: Path) -> None:
    """Raise UserError if `append` could not write there. Call it before measuring."""
    try:
        if os.path.lexists(path):
            path.open("a").close()
        else:
            check_writable(path.parent)
            path.exists()  # raises OSError for a name that is too long
    except OSError as error:
        raise UserError(
            f"--out {path}: {error.strerror}: name a file in a directory that can be written"
        ) from error


def append(path: Path, record: dict[str, Any]) -> None:
    """Append one line to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, without a torn last line; empty if the file does not exist.

    Raises UserError if the file cannot be read.
    """
    if not path.exists():
        return []
    records = []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}: name a file") from error
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            records += [record] if isinstance(record, dict) else []
    return records


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _strip_folder(argument: str) -> str:
    """Keep only the name of an absolute path: records are published, local folders are not."""
    return Path(argument).name if os.path.isabs(argument) else argument
