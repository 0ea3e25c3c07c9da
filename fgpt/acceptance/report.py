"""The report: a header line, then one JSON line per check; a check's last line counts.

    {"format": 1, "header": true, "device": ..., "hardware": ..., "versions": ..., "commit": ...}
    {"check": "masks", "state": "passed", "ok": true, "device": "cuda", "seconds": 9.1,
     "figures": {NAME: {"value": ..., "unit": ..., "at_most": ...}}, "not_run": {PART: REASON},
     "error": null}

States: passed, failed, not run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
IDENTITY = ("format", "device", "hardware", "versions", "python", "commit", "source", "driver")
"""Fields of the header that must be equal for earlier lines to count."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a report, without a torn one; empty if there is none."""
    lines = []
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        lines += [value] if isinstance(value, dict) else []
    return lines


def passed_before(path: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Name -> line of the checks that this commit has passed here, with these versions.

    None: the report is of another commit, machine or version, or there is none.
    """
    lines = read_lines(path)
    if not lines or any(lines[0].get(name) != header.get(name) for name in IDENTITY):
        return None
    latest = {line["check"]: line for line in lines[1:] if "check" in line}
    return {name: line for name, line in latest.items() if line["state"] == "passed"}


def start(path: Path, header: dict[str, Any]) -> None:
    """Begin a report; one of another commit, machine or version is kept beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.replace(path, path.with_name(f"{path.stem}.earlier{path.suffix}"))
    append(path, header)


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one line, on the disk when this returns."""
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a") as file:
        file.write("\n" * is_torn + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
