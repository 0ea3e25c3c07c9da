"""RUN_DIR/failures.jsonl: one line per rank that ended with an error, written by the rank itself.

Whoever restarts the run reads it: launchers report most failures as exit code 1. A rank that was
killed writes nothing; the ranks that notice its end do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fgpt.errors import DataError
from fgpt.utils.files import read_regular
from fgpt.utils.json_dataclass import from_json

FAILURES = "failures.jsonl"
LOST_RANK = "another rank is gone"
"""Is in the error of a rank that only noticed the end of another one."""


@dataclass(frozen=True)
class FailureRecord:
    """The failure of one rank."""

    time: float
    """When it was recorded, in seconds since 1970."""
    rank: int
    """The rank that failed."""
    step: int
    """Steps finished before the failure."""
    phase: str
    """What the rank did: data, forward, ..."""
    error: str
    """The error, in one line."""
    exit_code: int
    """Of the rank."""
    samples: tuple[int, ...] | None = None
    """Global sample numbers of the batch in flight; None: there was none."""
    checkpoint: str | None = None
    """The newest checkpoint; None: there is none."""

    @property
    def is_consequence(self) -> bool:
        """Whether this rank only noticed the end of another one."""
        return LOST_RANK in self.error


def append_failure(run_dir: Path, record: FailureRecord) -> None:
    """Append one line by a single write, so that lines of several ranks do not mix.

    Raises OSError; follows no link.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(run_dir / FAILURES, flags, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        line = json.dumps(asdict(record)).encode() + b"\n"
        os.write(descriptor, b"\n" + line if is_torn else line)
    finally:
        os.close(descriptor)


def read_failures(run_dir: Path, *, since: float = 0.0) -> list[FailureRecord]:
    """Return the records of `since` (seconds since 1970) or later, in the order of their lines.

    Leaves out lines that are no records, such as a torn last one; a file that cannot be read has no
    records.
    """
    try:
        lines = read_regular(run_dir / FAILURES).splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = from_json(FailureRecord, json.loads(line), FAILURES)
        except (ValueError, RecursionError, DataError):
            continue
        if record.time >= since:
            records.append(record)
    return records


def cause(records: Sequence[FailureRecord]) -> FailureRecord | None:
    """Return the first record that is no consequence of another rank's end, else the first record;
    None without records.
    """
    in_time = sorted(records, key=lambda record: record.time)
    own = [record for record in in_time if not record.is_consequence]
    return next(iter(own or in_time), None)
