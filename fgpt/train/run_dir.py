"""The directory of one run, held by one run at a time.

config.json     the resolved configuration, with the origin of each value
metrics.jsonl   one line per step and per evaluation
checkpoints/    see fgpt.checkpoint
loss.png, sample.txt, summary.json   written at the end
lock            held while a run writes here; says which process
"""

from __future__ import annotations

import json
from io import FileIO
from pathlib import Path
from typing import Any

from fgpt.errors import LaunchError
from fgpt.utils.files import LockHeldError, acquire_lock, write_atomic

OWN = {"lock", "config.json", "metrics.jsonl", "checkpoints"}
"""A directory with one of these is a run's."""


class RunDir:
    """An exclusive hold on a run directory. Rank 0's business only."""

    def __init__(self, path: Path):
        """Raises LaunchError if another run writes there, or it cannot be made or written."""
        self.path = path
        try:
            self.lock = self._hold()
        except OSError as error:
            raise LaunchError(f"--run_dir {path}: {error.strerror}: {error.filename}") from error

    def _hold(self) -> FileIO:
        self.path.mkdir(parents=True, exist_ok=True)
        present = {entry.name for entry in self.path.iterdir()}
        if present and not present & OWN:
            raise LaunchError(
                f"--run_dir {self.path}: holds {min(present)!r} and is no run's directory; choose"
                " one that is new, empty, or an earlier run's"
            )
        try:
            return acquire_lock(self.path / "lock", wait=False)  # held for the life of the run
        except LockHeldError as error:
            raise LaunchError(
                f"{self.path}: another run (process {error.pid}) writes here;"
                " stop it, or choose another --run_dir"
            ) from error

    def start_afresh(self) -> Path | None:
        """Move an earlier run aside, to NAME.1, NAME.2, ...; say where it went."""
        if not any((self.path / name).exists() for name in ("metrics.jsonl", "checkpoints")):
            return None  # nothing was trained here
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(aside)
        self.lock.close()
        self.lock = self._hold()
        return aside

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole or not at all."""
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
        write_atomic(self.path / name, text.encode())

    def forget_metrics_after(self, step: int) -> None:
        """Drop the records of steps that are about to be taken again, and a torn last line."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                break
            if record["step"] <= step:
                kept.append(line)
        write_atomic(path, "".join(line + "\n" for line in kept).encode())
