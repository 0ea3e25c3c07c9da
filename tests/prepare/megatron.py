"""Megatron-LM's reader and writer of shards, run in a subprocess.

Their import is slow and prints warnings.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

READ = """
import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset
data = IndexedDataset(sys.argv[1])
print(json.dumps({
    "sequences": [data[i].tolist() for i in range(len(data))],
    "lengths": data.sequence_lengths.tolist(),
    "documents": data.document_indices.tolist(),
    "dtype": str(data.index.dtype.__name__),
}))
"""

WRITE = """
import json, sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
prefix, dtype, documents = sys.argv[1], getattr(numpy, sys.argv[2]), json.load(sys.stdin)
builder = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
for document in documents:
    for sequence in document:
        builder.add_item(torch.tensor(sequence, dtype=torch.int64))
    builder.end_document()
builder.finalize(prefix + ".idx")
"""


def read(prefix: Path) -> dict[str, Any]:
    """Read a shard with Megatron's IndexedDataset."""
    found: dict[str, Any] = json.loads(_run(READ, prefix))
    return found


def write(prefix: Path, documents: list[list[list[int]]], dtype: type[np.integer]) -> Path:
    """Write documents of one or more sequences with Megatron's builder."""
    _run(WRITE, prefix, dtype.__name__, stdin=json.dumps(documents))
    return prefix


def _run(code: str, *args: object, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
