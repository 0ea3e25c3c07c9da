"""Streaming writer of a token shard: documents -> PREFIX.bin and PREFIX.idx."""

from __future__ import annotations

import hashlib
import os
from array import array
from pathlib import Path

import numpy as np

from fgpt.data.index import dtype_for, write_index
from fgpt.data.shards import ShardInfo, check_id_range, sampled_sha256, shard_path
from fgpt.errors import DataError
from fgpt.utils.files import sync_directory


class ShardWriter:
    """Streams documents into PREFIX.bin and PREFIX.idx; memory: 4 bytes per document.

    The files get their names in `close`; leaving the `with` block earlier removes them.
    """

    def __init__(self, prefix: Path, vocab_size: int):
        self._prefix = prefix
        self._vocab_size = vocab_size
        self.dtype = dtype_for(vocab_size)
        self._lengths = array("i")
        self._max_id = -1
        self._tokens = 0
        self._hash = hashlib.sha256()
        self._tmp = {suffix: shard_path(prefix, suffix + ".tmp") for suffix in (".bin", ".idx")}
        self._file = self._tmp[".bin"].open("wb")

    def add(self, ids: np.ndarray) -> None:
        """Append one document, ids int [n], n >= 1. Raises DataError for an id out of range."""
        self.extend(ids, np.array([ids.size], "<i4"))

    def extend(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: ids, end to end, int [sum of lengths], and lengths, int [documents].

        Raises DataError for an id or a length out of range.
        """
        if len(lengths) and not 1 <= lengths.min() <= lengths.max() < 2**31:
            bad = lengths.min() if lengths.min() < 1 else lengths.max()
            fix = "end empty documents with the eod id, split longer ones"
            problem = f"a document has {bad} tokens, expected 1 to 2^31 - 1"
            raise DataError(f"{self._prefix}: {problem}; {fix}")
        total = int(lengths.sum(dtype=np.int64))
        if total != ids.size:
            raise DataError(f"{self._prefix}: {ids.size} ids for documents of {total} tokens")
        max_id = check_id_range(ids, self._vocab_size, str(self._prefix))
        data = np.ascontiguousarray(ids, self.dtype).data.cast("B")
        self._file.write(data)
        self._hash.update(data)
        self._lengths.frombytes(lengths.astype(np.intc).tobytes())
        self._tokens += ids.size
        self._max_id = max(self._max_id, max_id)

    def close(self) -> ShardInfo:
        """Fsync both files, give them their names, and return a description of the shard."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        lengths = np.frombuffer(self._lengths, np.intc) if self._lengths else np.zeros(0, np.intc)
        idx_bytes, idx_sha256 = write_index(self._tmp[".idx"], lengths, self.dtype)
        for suffix, tmp in self._tmp.items():
            tmp.replace(shard_path(self._prefix, suffix))
        sync_directory(self._prefix.parent)
        return ShardInfo(
            documents=len(lengths),
            tokens=self._tokens,
            max_id=self._max_id,
            bin_bytes=self._tokens * self.dtype.itemsize,
            bin_sha256=self._hash.hexdigest(),
            bin_sampled_sha256=sampled_sha256(shard_path(self._prefix, ".bin")),
            idx_bytes=idx_bytes,
            idx_sha256=idx_sha256,
        )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:
            for tmp in self._tmp.values():
                tmp.unlink(missing_ok=True)
