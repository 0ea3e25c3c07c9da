"""The run directory, which belongs to one run at a time.

config.json     the resolved configuration with the origin of each value
metrics.jsonl   one line per step, evaluation and suite of questions
samples.jsonl   texts over time
checkpoints/    see fgpt.checkpoint
tokenizer/      a copy of the data's tokenizer
launch.json     the launch that began the run (see fgpt.train.relaunch)
loss.png, sample.txt, summary.json   written at the end
lock            held while a run writes here; contains rank 0's process id and host
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from io import FileIO
from pathlib import Path
from typing import Any

from fgpt.checkpoint.directory import NAME
from fgpt.distributed.agreements import run_on_all
from fgpt.doctor.disk import probe_shared
from fgpt.errors import LaunchError, printable
from fgpt.train.startup import RunContext
from fgpt.utils.files import LockHeldError, acquire_lock, read_regular, write_atomic

SHARED_FILE_S = 30.0
"""Time for a new file to appear on the other nodes, in seconds: network file systems cache."""
OWNER_ONLY = 0o700
"""Mode of a new run directory: its weights and texts may be as secret as the data."""
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
RUN_FILES = {"lock", "config.json", METRICS, "checkpoints"}
"""A directory with any of these is a run directory."""


class RunDir:
    """The locked run directory; rank 0 only."""

    def __init__(self, path: Path):
        """Raises LaunchError if another run holds the lock, or the directory is not writable."""
        self.path = path
        try:
            os.fspath(path).encode()
        except UnicodeEncodeError as error:
            raise LaunchError(
                f"--run_dir {printable(str(path))}: the name is not UTF-8, and safetensors reads no"
                " such path; choose another"
            ) from error
        if NAME.fullmatch(path.name):
            raise LaunchError(f"--run_dir {path}: is a checkpoint's name; choose another")
        try:
            self.lock = self._acquire()
        except OSError as error:
            what = "" if error.filename in (None, str(path)) else f"{error.filename}: "
            raise LaunchError(
                f"--run_dir {path}: {what}{error.strerror}; name a directory that can be made or"
                " written"
            ) from error

    def _acquire(self) -> FileIO:
        path = without_links(self.path)  # also where a link leads
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(OWNER_ONLY, exist_ok=True)
        present = {entry.name for entry in self.path.iterdir()}
        if present and not present & RUN_FILES:
            raise LaunchError(
                f"--run_dir {self.path}: contains {min(present)!r} and is no run directory; choose"
                " a new or empty directory, or that of an earlier run"
            )
        try:
            return acquire_lock(self.path / "lock", wait=False)  # until the process ends
        except LockHeldError as error:
            raise LaunchError(
                f"{self.path}: another run (process {error.pid}) writes here;"
                " stop it, or choose another --run_dir"
            ) from error

    def move_earlier_run(self) -> Path | None:
        """Rename an earlier run to NAME.1, NAME.2, ...; returns the new path, None without one.

        A mount point, or a directory in one that is not writable, cannot be renamed: then the
        earlier run moves into a directory of that name inside it.
        """
        if not any((self.path / name).exists() for name in (METRICS, "checkpoints")):
            return None
        path = without_links(self.path)  # a link to another disk stays, its target moves
        number = 1
        while any((parent / f"{path.name}.{number}").exists() for parent in (path.parent, path)):
            number += 1
        name = f"{path.name}.{number}"
        mode = stat.S_IMODE(path.stat().st_mode)
        try:
            path.rename(path.with_name(name))
        except OSError:
            (path / name).mkdir()
            stays = re.compile(re.escape(path.name) + r"\.\d+|lock")
            for entry in path.iterdir():
                if not stays.fullmatch(entry.name):
                    entry.rename(path / name / entry.name)
            return path / name
        self.lock.close()
        self.lock = self._acquire()
        path.chmod(mode)  # that of the earlier run, which the user may have opened to others
        return path.with_name(name)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically."""
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
        write_atomic(self.path / name, text.encode())

    def truncate_records(self, step: int) -> None:
        """Drop records after `step`, which will be trained again, and lines that are no records.

        Raises LaunchError, also for what is no regular file.
        """
        for name in (METRICS, SAMPLES):
            path = self.path / name
            try:
                if os.path.lexists(path):
                    _truncate(path, step)
            except OSError as error:
                raise LaunchError(f"{path}: {error.strerror}; move it away") from error


def _truncate(path: Path, step: int) -> None:
    """Drop the lines of a file of records after `step`, and those that are no records."""
    kept = []
    for line in read_regular(path).splitlines():
        try:
            record = json.loads(line)
            if record["step"] > step:
                continue
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # no record: a crash of the machine, or another's line
        kept.append(line)
    write_atomic(path, b"".join(line + b"\n" for line in kept))


def check_shared(context: RunContext) -> None:
    """Raise LaunchError unless every node sees rank 0's run directory.

    Else a save would write each node's files to its own disk, and no resume would find them all.
    """
    path, device = context.path, context.device
    seen = probe_shared(path, context.world, device, SHARED_FILE_S)

    def check() -> None:
        if not seen[context.world.rank]:
            raise LaunchError(
                f"{socket.gethostname()}: --run_dir {path}: is not rank 0's directory: name one on"
                " a file system that all nodes share, by the same path"
            )

    run_on_all(check, device)


def without_links(path: Path) -> Path:
    """The absolute path; Path.resolve raises RuntimeError on links that lead to each other."""
    return Path(os.path.realpath(path))
