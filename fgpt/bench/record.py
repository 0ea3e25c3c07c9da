"""One JSON line per measurement, with everything needed to repeat or to doubt it."""

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
from pathlib import Path
from typing import Any

import torch

from fgpt.errors import UserError

PACKAGES = ("torch", "deepspeed", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and command of this process."""
    return {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["fgpt", *map(_without_folder, sys.argv[1:])],
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "source": source(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def hardware(device: torch.device) -> str:
    """The device's name, and for a CPU the cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].partition(":")[2].strip() if models else name
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{name}, {cores} cores"


def must_be_writable(path: Path) -> None:
    """Raise UserError, before anything is measured, if `append` could not write there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a"):
            pass
    except OSError as error:
        raise UserError(
            f"--out {path}: {error.strerror}: name a file in a directory that can be written"
        ) from error


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; none where there is no file. A torn last line is left out.

    Raises UserError where the file cannot be read.
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


def source() -> str:
    """Hash of the package's files and of ds_configs/bench: what is measured."""
    package = Path(__file__).parents[1]
    files = [*package.rglob("*.py"), *(package.parent / "ds_configs/bench").glob("*.json")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _without_folder(argument: str) -> str:
    """An absolute path as its last part: records are published, folders of a machine are not."""
    return Path(argument).name if os.path.isabs(argument) else argument
