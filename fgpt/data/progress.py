"""Progress of a long pass over a corpus: a bar on a terminal, one closing line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fgpt.data.decode import Document

MB = 1e6


class Reporter:
    """Prints to stderr; `enabled` False prints nothing."""

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """Print one line."""
        if self._enabled:
            self._console.print(line, markup=False)

    def watch(
        self, documents: Iterable[Document], title: str, total_bytes: int
    ) -> Iterator[Document]:
        """Pass the documents on, showing their number, MB/s and the time left."""
        t0 = time.perf_counter()
        count, size = 0, 0
        with self._bar() as bar:
            task = bar.add_task(title, total=total_bytes, detail="")
            for document in documents:
                yield document
                count += 1
                size += len(document.text.encode())
                speed = size / MB / max(time.perf_counter() - t0, 1e-9)
                bar.update(task, completed=size, detail=f"{count} documents  {speed:.1f} MB/s")
        elapsed_s = time.perf_counter() - t0
        rate = f"{size / MB:.1f} MB in {elapsed_s:.1f} s ({size / MB / elapsed_s:.1f} MB/s)"
        self.say(f"  {title}: {count} documents, {rate}")

    def _bar(self) -> Progress:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[detail]}"),
            TimeRemainingColumn(),
        )
        shown = self._enabled and self._console.is_terminal
        return Progress(*columns, console=self._console, transient=True, disable=not shown)
