"""Progress of a long operation on a corpus: a bar on a terminal, otherwise one line at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fgpt.errors import printable

MB = 1e6


class ProgressBar:
    def __init__(self, bar: Progress, title: str, total_bytes: int | None, by_tasks: bool):
        self._bar = bar
        self._by_tasks = by_tasks
        self._task = bar.add_task(title, total=total_bytes, detail="")
        self.t0 = time.perf_counter()
        self.bytes = 0
        """Text processed, in bytes."""
        self.finished_bytes = 0
        """Source bytes of finished tasks; of compressed files not those of the text."""
        self.note = ""

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.t0

    def advance(self, text_bytes: int) -> None:
        """Count `text_bytes` more bytes of text."""
        self.bytes += text_bytes
        speed = self.bytes / MB / max(self.elapsed_s, 1e-9)
        detail = f"{self.bytes / MB:.1f} MB  {speed:.1f} MB/s"
        done = self.finished_bytes if self._by_tasks else self.bytes
        self._bar.update(self._task, completed=done, detail=detail)


class Reporter:
    """Prints to stderr; silent if not `enabled`."""

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    def print(self, line: str) -> None:
        if self._enabled:
            self._console.print(printable(line), markup=False)

    @contextmanager
    def progress_bar(
        self, title: str, total_bytes: int | None, *, by_tasks: bool = False
    ) -> Iterator[ProgressBar]:
        """Show a bar with MB/s and the time left; print a closing line unless an error is raised.

        `total_bytes`: approximate total, None if unknown; of text, or with `by_tasks` of
        `ProgressBar.finished_bytes`.
        """
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[detail]}"),
            TimeRemainingColumn(),
        )
        is_shown = self._enabled and self._console.is_terminal
        bar = Progress(*columns, console=self._console, transient=True, disable=not is_shown)
        with bar:
            progress = ProgressBar(bar, title, total_bytes, by_tasks)
            yield progress
        elapsed_s = max(progress.elapsed_s, 1e-9)
        size = progress.bytes / MB
        rate = f"{size:.1f} MB in {elapsed_s:.1f} s ({size / elapsed_s:.1f} MB/s)"
        self.print(f"  {title}: {rate}{progress.note}")
