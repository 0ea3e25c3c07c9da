"""The environment of a measurement (machine, versions), and files of JSON records."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fgpt.bench.machine import hardware, machine
from fgpt.errors import UserError
from fgpt.utils.files import check_writable

PACKAGES = ("torch", "deepspeed", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and command of this process."""
    facts = machine(device)
    return {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["fgpt", *map(_strip_folder, sys.argv[1:])],
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "source": source_hash(),
        "hardware": hardware(facts),
        "machine": facts,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def source_hash() -> str:
    """Hash of the package's Python files and of ds_configs/bench."""
    package = Path(__file__).parents[1]
    files = [*package.rglob("*.py"), *(package.parent / "ds_configs/bench").glob("*.json")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


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
    """Keep only the names of absolute paths, as in NAME=PATH,PATH: records are published, local
    folders are not.
    """
    return re.sub(r"(?<![^=,])/[^=,]*", lambda path: Path(path[0]).name, argument)
