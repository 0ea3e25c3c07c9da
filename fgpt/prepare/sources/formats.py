"""What a file holds, by its suffix, and how it is read.

    .txt .md .py   the whole file is one document, or one per `separator` (streamed)
    .jsonl         one object per line; the document is its `text_field`
    .parquet       one row per document; the document is column `text_field` (streamed by batches)

The first two also under .gz and .zst.
"""

from __future__ import annotations

from collections.abc import Callable

from fgpt.prepare.sources.readers import Items, ReadOptions, read_jsonl, read_text
from fgpt.prepare.sources.spans import Span
from fgpt.prepare.sources.table_rows import read_parquet

READERS: dict[str, Callable[[Span, ReadOptions], Items]] = {
    ".txt": read_text,
    ".md": read_text,
    ".py": read_text,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
PLAIN = tuple(suffix for suffix, reader in READERS.items() if reader is read_text)
"""Names of files of plain text end so, most of them: `readers.read_file` takes them whole."""
