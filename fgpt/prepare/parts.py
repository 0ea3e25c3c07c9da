"""One task -> one part: the ids and the table of documents of a piece of the corpus, on disk.

    NNNNNN.ids    the ids of its documents end to end, each closed by the eod id
    NNNNNN.docs   DOCUMENT records, in the same order
    NNNNNN.json   the `Part`: written last, so a part without it does not count

A part depends on the task and the encoder alone: neither the number of workers nor the order in
which they finish changes a byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from fgpt.data.index import dtype_for
from fgpt.data.shards import check_range
from fgpt.prepare.sources.corpus import Corpus, Tally, Task, batches
from fgpt.prepare.split import split_keys, text_hash
from fgpt.prepare.verified_encoder import VerifiedEncoder
from fgpt.tokenizer.encoders import EncoderSpec
from fgpt.tokenizer.errors import FastEncoderUnavailable
from fgpt.utils.files import hash_file

PART_FORMAT = 2  # raise it when older parts must not be used: of 1, some Unigram ids were wrong
BATCH_BYTES = 2**20

DOCUMENT = np.dtype([("tokens", "<i4"), ("key", "<u8"), ("digest", "u1", 16)])
"""Length with the eod id, split key, hash of the text (`split.text_hash`)."""


@dataclass(frozen=True)
class Job:
    """What every task of a preparation shares. Picklable."""

    corpus: Corpus
    """Where the text comes from."""
    seed: int
    """Of the split keys."""
    folder: Path
    """Where parts are written."""
    encoder: EncoderSpec | None
    """Text to ids; None: only look at the documents, write no ids."""
    eod_id: int = 0
    """Id that closes each document."""
    vocab_size: int = 0
    """Largest id + 1."""


@dataclass
class Timing:
    """Where the time of a preparation went, over all workers."""

    busy_s: float = 0.0
    """Time that workers had a task, in seconds."""
    encode_s: float = 0.0
    """How much of it was inside the encoder."""
    encoder: str = ""
    """The encoder, and why it was chosen."""

    def told(self, parts: list[Part], workers: int, encoder: str) -> str:
        """Take the times of these parts; a few words about them for people."""
        self.busy_s = sum(part.busy_s for part in parts)
        self.encode_s = sum(part.encode_s for part in parts)
        if not encoder or not self.busy_s:
            return ""
        return f", {max(1, workers)} at work, {self.encode_s / self.busy_s:.0%} of it in {encoder}"


@dataclass
class Part:
    """What a finished part holds."""

    number: int
    """The task's number."""
    tally: Tally
    """What was read."""
    input: str = ""
    """The task's digest."""
    tokens: int = 0
    """Ids written, eod ids included."""
    xxh3: dict[str, str] = field(default_factory=dict)
    """XXH3-128 of each file, by suffix."""
    busy_s: float = 0.0
    """Time this task took, in seconds."""
    encode_s: float = 0.0
    """How much of it was inside the encoder."""
    fault: str | None = None
    """What is wrong with the fast encoder's ids: the part is void."""

    @classmethod
    def read(cls, folder: Path, number: int) -> Part | None:
        """The finished part of this number, None if there is none or it is damaged."""
        try:
            value = json.loads(part_file(folder, number, "json").read_bytes())
            part = cls(**(value | {"tally": Tally(**value["tally"])}))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        for suffix, wanted in part.xxh3.items():
            path = part_file(folder, number, suffix)
            if not path.exists() or hash_file(path, xxhash.xxh3_128()) != wanted:
                return None
        return part


def part_file(folder: Path, number: int, suffix: str) -> Path:
    """Path of one file of a part."""
    return folder / f"{number:06d}.{suffix}"


def make_part(
    job: Job, encoder: VerifiedEncoder | None, task: Task, progress: Callable[[int], None]
) -> Part:
    """Read, check, hash and encode one task; leaves a finished part, or none.

    `progress` is told the bytes of text done, batch by batch. Raises DataError, OSError.
    """
    part = Part(task.number, Tally(), task.digest)
    t0, before_s = time.perf_counter(), encoder.spent_s if encoder else 0.0
    with _Output(job, task.number) as output:
        for texts in batches(job.corpus, part.tally, task, BATCH_BYTES):
            if encoder is None:
                output.add(texts, None, np.zeros(len(texts), "<i4"))
            else:
                if part.tokens == 0 and (mismatch := encoder.find_mismatch(texts)):
                    part.fault = mismatch
                    return part
                try:
                    ids, lengths = encoder.encode(texts)
                except FastEncoderUnavailable as error:
                    part.fault = str(error)
                    return part
                output.add(texts, with_eod(ids, lengths, job), lengths + 1)
                part.tokens += len(ids) + len(lengths)
            progress(sum(map(len, texts)))
        part.encode_s = encoder.spent_s - before_s if encoder else 0.0
        part.busy_s = time.perf_counter() - t0
        output.finish(part)
    return part


def with_eod(ids: np.ndarray, lengths: np.ndarray, job: Job) -> bytes:
    """Ids of several documents end to end -> the same as in the shard, each closed by eod.

    Raises DataError for an id out of range.
    """
    check_range(ids, job.vocab_size, job.corpus.label)
    dtype = dtype_for(job.vocab_size)
    stored = ids.astype(dtype).data.cast("B")
    edges = [0, *(np.cumsum(lengths) * dtype.itemsize).tolist()]
    each = map(stored.__getitem__, map(slice, edges, edges[1:]))
    return np.array(job.eod_id, dtype).tobytes().join([*each, b""])


class _Output:
    """The files of a part while it is written, under names that nobody takes for finished."""

    def __init__(self, job: Job, number: int):
        self.seed, self.folder, self.number = job.seed, job.folder, number
        suffixes = ("ids", "docs") if job.encoder is not None else ("docs",)
        self._paths = {suffix: self._tmp(suffix) for suffix in suffixes}
        self._files = {suffix: path.open("wb") for suffix, path in self._paths.items()}
        self._hashes = {suffix: xxhash.xxh3_128() for suffix in suffixes}

    def _tmp(self, suffix: str) -> Path:
        return part_file(self.folder, self.number, f"{suffix}.{os.getpid()}.tmp")

    def add(self, texts: list[bytes], ids: bytes | None, lengths: np.ndarray) -> None:
        """Append a batch of documents; `lengths` int [len(texts)] in tokens."""
        table = np.zeros(len(texts), DOCUMENT)
        digests = b"".join(map(text_hash, texts))
        table["digest"] = np.frombuffer(digests, "u1").reshape(-1, 16)
        table["key"] = split_keys(self.seed, table["digest"])
        table["tokens"] = lengths
        self._write("docs", table.tobytes())
        if ids is not None:
            self._write("ids", ids)

    def _write(self, suffix: str, data: bytes) -> None:
        self._files[suffix].write(data)
        self._hashes[suffix].update(data)

    def finish(self, part: Part) -> None:
        """Give the files their names, the record last."""
        part.xxh3 = {suffix: digest.hexdigest() for suffix, digest in self._hashes.items()}
        for suffix, file in self._files.items():
            file.close()
            self._paths[suffix].replace(part_file(self.folder, self.number, suffix))
        record = self._paths["json"] = self._tmp("json")
        record.write_text(json.dumps(asdict(part)))
        record.replace(part_file(self.folder, self.number, "json"))

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk is reported where it was met
                file.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)


def read_table(folder: Path, part: Part) -> np.ndarray:
    """DOCUMENT [documents] of a part, memory-mapped: a compressed file may be one huge task."""
    return _mapped(part_file(folder, part.number, "docs"), DOCUMENT)


def read_ids(folder: Path, part: Part, dtype: np.dtype) -> np.ndarray:
    """Ids [tokens] of a part, memory-mapped."""
    return _mapped(part_file(folder, part.number, "ids"), dtype)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r").view(np.ndarray)
