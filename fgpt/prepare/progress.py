"""Progress of a long pass over a corpus: a bar on a terminal, one closing line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

MB = 1e6


class Pass:
    """One pass that is going on."""

    def __init__(self, bar: Progress, title: str, total_bytes: int | None, by_tasks: bool):
        self._bar = bar
        self._by_tasks = by_tasks
        self._task = bar.add_task(title, total=total_bytes, detail="")
        self.t0 = time.perf_counter()
        self.bytes = 0
        """Text done, in bytes."""
        self.finished_bytes = 0
        """How much of the total is finished, if it is not counted in text (compressed files)."""
        self.note = ""
        """What else the closing line says."""

    @property
    def elapsed_s(self) -> float:
        """Time since its beginning, in seconds."""
        return time.perf_counter() - self.t0

    def advance(self, done_bytes: int) -> None:
        """Count `done_bytes` more bytes of text."""
        self.bytes += done_bytes
        speed = self.bytes / MB / max(self.elapsed_s, 1e-9)
        detail = f"{self.bytes / MB:.1f} MB  {speed:.1f} MB/s"
        done = self.finished_bytes if self._by_tasks else self.bytes
        self._bar.update(self._task, completed=done, detail=detail)


class Reporter:
    """Prints to stderr; `enabled` False prints nothing."""

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """Print one line."""
        if self._enabled:
            self._console.print(line, markup=False)

    @contextmanager
    def watch(
        self, title: str, total_bytes: int | None, *, by_tasks: bool = False
    ) -> Iterator[Pass]:
        """A bar with MB/s and the time left; a closing line if the pass ends well.

        `total_bytes`: about how much there is, None if nobody knows; counted in text, or `by_tasks`
        in `Pass.finished_bytes`.
        """
        with self._bar() as bar:
            going = Pass(bar, title, total_bytes, by_tasks)
            yield going
        elapsed_s = max(going.elapsed_s, 1e-9)
        size = going.bytes / MB
        rate = f"{size:.1f} MB in {elapsed_s:.1f} s ({size / elapsed_s:.1f} MB/s)"
        self.say(f"  {title}: {rate}{going.note}")

    def _bar(self) -> Progress:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[detail]}"),
            TimeRemainingColumn(),
        )
        shown = self._enabled and self._console.is_terminal
        return Progress(*columns, console=self._console, transient=True, disable=not shown)
