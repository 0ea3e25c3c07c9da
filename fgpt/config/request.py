"""What the user asked for on the command line, before any file is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Override(NamedTuple):
    """One value given on the command line."""

    key: str
    """Dotted run-file field, `train.steps`."""
    value: Any
    flag: str
    """The flag it came from, for reports: `--steps`."""


@dataclass(frozen=True)
class RunRequest:
    """What the user asked for; `fgpt.config.resolve.resolve` turns it into a run."""

    ds_config: Path
    """The DeepSpeed JSON."""
    run_file: Path | None = None
    """The run file; None: every default."""
    overrides: tuple[Override, ...] = ()
    """In the order given; a later one wins."""
    deepspeed: Mapping[str, Any] | None = None
    """The DeepSpeed configuration, in place of the file `ds_config`, which then only names it."""
