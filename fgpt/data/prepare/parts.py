"""One task -> one part: the ids and the table of documents of a piece of the corpus, on disk.

    NNNNNN.ids    the ids of its documents end to end, each closed by the eod id
    NNNNNN.docs   DOCUMENT records, in the same order
    NNNNNN.json   the `Part`: written last, so a part without it does not count

A part depends on the task and the encoder alone: neither the number of workers nor the order in
which they finish changes a byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from fgpt.data.corpus.base import Corpus, Tally, Task, documents
from fgpt.data.files import sha256_file
from fgpt.data.index import dtype_for
from fgpt.data.shards import check_range
from fgpt.data.split import split_keys
from fgpt.data.tokenizer.base import Ids
from fgpt.data.tokenizer.fast import EncoderSpec
from fgpt.errors import DataError

BATCH_BYTES = 2**22
SPOT_BYTES = 2**14

DOCUMENT = np.dtype([("tokens", "<i4"), ("key", "<u8"), ("digest", "u1", 32)])
"""Length with the eod id, split key, SHA-256 of the text."""


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


class Encoders:
    """A job's encoder, and the exact one beside it if that is another."""

    def __init__(self, spec: EncoderSpec):
        self._encoder = spec.build()
        self._exact = replace(spec, fast=False).build() if spec.fast else None
        self.spent_s = 0.0
        """Time inside the encoder so far, in seconds."""

    def encode(self, texts: list[bytes]) -> Ids:
        """See `Encoder.encode`."""
        t0 = time.perf_counter()
        found = self._encoder.encode(texts)
        self.spent_s += time.perf_counter() - t0
        return found

    def differs(self, text: bytes) -> bool:
        """Whether the exact encoder gives other ids for the beginning of this text."""
        if self._exact is None:
            return False
        head = text[:SPOT_BYTES].decode(errors="ignore").encode()
        return not np.array_equal(self._encoder.encode([head])[0], self._exact.encode([head])[0])


@dataclass
class Part:
    """What a finished part holds."""

    number: int
    """The task's number."""
    tally: Tally
    """What was read."""
    tokens: int = 0
    """Ids written, eod ids included."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Hash of each file, by suffix."""
    busy_s: float = 0.0
    """Time this task took, in seconds."""
    encode_s: float = 0.0
    """How much of it was inside the encoder."""
    differs: bool = False
    """The fast encoder gave other ids than the exact one: the part is void."""

    @classmethod
    def read(cls, folder: Path, number: int) -> Part | None:
        """The finished part of this number, None if there is none or it is damaged."""
        try:
            value = json.loads(part_file(folder, number, "json").read_bytes())
            part = cls(**(value | {"tally": Tally(**value["tally"])}))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        for suffix, wanted in part.sha256.items():
            path = part_file(folder, number, suffix)
            if not path.exists() or sha256_file(path) != wanted:
                return None
        return part


def part_file(folder: Path, number: int, suffix: str) -> Path:
    """Path of one file of a part."""
    return folder / f"{number:06d}.{suffix}"


def make_part(
    job: Job, encoders: Encoders | None, task: Task, progress: Callable[[int], None]
) -> Part:
    """Read, check, hash and encode one task; leaves a finished part, or none.

    `progress` is told the bytes of text done, batch by batch. Raises DataError, OSError.
    """
    part = Part(task.number, Tally())
    t0, before_s = time.perf_counter(), encoders.spent_s if encoders else 0.0
    with _Output(job, task.number) as output:
        for texts in _batches(job.corpus, task, part.tally):
            if encoders is None:
                output.add(texts, None, np.zeros(len(texts), "<i4"))
            else:
                if part.tokens == 0 and encoders.differs(texts[0]):
                    part.differs = True
                    return part
                ids, lengths = encoders.encode(texts)
                output.add(texts, with_eod(ids, lengths, job), lengths + 1)
                part.tokens += len(ids) + len(lengths)
            progress(sum(map(len, texts)))
        part.encode_s = encoders.spent_s - before_s if encoders else 0.0
        part.busy_s = time.perf_counter() - t0
        output.finish(part)
    return part


def with_eod(ids: np.ndarray, lengths: np.ndarray, job: Job) -> np.ndarray:
    """Ids of several documents end to end -> the same, in the shard's dtype, each closed by eod.

    Raises DataError for an id out of range.
    """
    check_range(ids, job.vocab_size, job.corpus.label)
    ends = np.cumsum(lengths) + np.arange(len(lengths))
    out = np.empty(len(ids) + len(lengths), dtype_for(job.vocab_size))
    is_text = np.ones(len(out), bool)
    is_text[ends] = False
    out[ends] = job.eod_id
    out[is_text] = ids
    return out


def _batches(corpus: Corpus, task: Task, tally: Tally) -> Iterator[list[bytes]]:
    """The task's texts, in lists of about BATCH_BYTES: bounded memory whatever a file holds."""
    batch: list[bytes] = []
    size = 0
    for document in documents(corpus, tally, [task]):
        batch.append(document.data)
        size += len(document.data)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Output:
    """The files of a part while it is written, under names that nobody takes for finished."""

    def __init__(self, job: Job, number: int):
        self.seed, self.folder, self.number = job.seed, job.folder, number
        suffixes = ("ids", "docs") if job.encoder is not None else ("docs",)
        self._paths = {suffix: self._tmp(suffix) for suffix in suffixes}
        self._files = {suffix: path.open("wb") for suffix, path in self._paths.items()}
        self._hashes = {suffix: hashlib.sha256() for suffix in suffixes}

    def _tmp(self, suffix: str) -> Path:
        return part_file(self.folder, self.number, f"{suffix}.{os.getpid()}.tmp")

    def add(self, texts: list[bytes], ids: np.ndarray | None, lengths: np.ndarray) -> None:
        """Append a batch of documents; `lengths` int [len(texts)] in tokens."""
        table = np.zeros(len(texts), DOCUMENT)
        digests = b"".join([hashlib.sha256(text).digest() for text in texts])
        table["digest"] = np.frombuffer(digests, "u1").reshape(-1, 32)
        table["key"] = split_keys(self.seed, table["digest"])
        table["tokens"] = lengths
        self._write("docs", table.tobytes())
        if ids is not None:
            self._write("ids", ids.data.cast("B"))

    def _write(self, suffix: str, data: bytes | memoryview) -> None:
        self._files[suffix].write(data)
        self._hashes[suffix].update(data)

    def finish(self, part: Part) -> None:
        """Give the files their names, the record last."""
        part.sha256 = {suffix: digest.hexdigest() for suffix, digest in self._hashes.items()}
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
    """DOCUMENT [documents] of a part. Raises DataError if it is not what was written."""
    return np.frombuffer(_checked(folder, part, "docs"), DOCUMENT)


def read_ids(folder: Path, part: Part, dtype: np.dtype) -> np.ndarray:
    """Ids [tokens] of a part. Raises DataError if they are not what was written."""
    return np.frombuffer(_checked(folder, part, "ids"), dtype)


def _checked(folder: Path, part: Part, suffix: str) -> bytes:
    path = part_file(folder, part.number, suffix)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != part.sha256[suffix]:
        raise DataError(f"{path}: changed since it was written; remove {folder} and run again")
    return data
