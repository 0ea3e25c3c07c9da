"""Shard parts: the ids and the document table of one task of the corpus, on disk.

    NNNNNN.ids    ids of the documents, concatenated, each document followed by the eod id
    NNNNNN.docs   DOCUMENT records, in the same order
    NNNNNN.json   `ShardPart`; written last: a part without it is unfinished

A part depends on the task and the encoder only, so neither the number of workers nor the order in
which they finish changes a byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from fgpt.data.index import dtype_for
from fgpt.data.shards import check_id_range
from fgpt.prepare.sources.corpus import Corpus, CorpusTask, ReadStats, read_batches
from fgpt.prepare.split import split_keys, text_hash
from fgpt.prepare.verified_encoder import VerifiedEncoder
from fgpt.tokenizer.encoders import EncoderSpec
from fgpt.tokenizer.errors import FastEncoderUnavailable
from fgpt.utils.files import hash_file

PART_FORMAT = 2  # raise it to discard older parts: those of format 1 had wrong Unigram ids
BATCH_BYTES = 2**20
TABLE_BLOCK = 2**16

DOCUMENT = np.dtype([("tokens", "<i4"), ("key", "<u8"), ("digest", "u1", 16)])
"""Length with the eod id, split key, hash of the text (`split.text_hash`)."""


@dataclass(frozen=True)
class WorkerConfig:
    """The settings common to all tasks. Picklable."""

    corpus: Corpus
    seed: int
    parts_dir: Path
    encoder: EncoderSpec | None  # encoder of the text; None: hash the documents, write no ids
    eod_id: int = 0
    vocab_size: int = 0


@dataclass
class Timing:
    """Time spent in tasks, summed over all workers."""

    busy_s: float = 0.0
    encode_s: float = 0.0  # time in the encoder, which is part of `busy_s`
    encoder: str = ""  # the encoder, and why it was chosen

    def summarize(self, parts: list[ShardPart], workers: int, encoder: str) -> str:
        """Set the times from these parts; returns a note for the user."""
        self.busy_s = sum(part.busy_s for part in parts)
        self.encode_s = sum(part.encode_s for part in parts)
        if not encoder or not self.busy_s:
            return ""
        share = self.encode_s / self.busy_s
        return f", {max(1, workers)} at work, {share:.0%} of it in {encoder}"


@dataclass
class ShardPart:
    """One part: the result of a task."""

    number: int
    stats: ReadStats
    task_digest: str = ""
    tokens: int = 0  # number of ids, eod ids included
    xxh3: dict[str, str] = field(default_factory=dict)  # XXH3-128 of each file, by suffix
    busy_s: float = 0.0
    encode_s: float = 0.0
    mismatch: str | None = None
    """How the fast encoder's ids differ from the library's; such a part is never written."""

    def to_record(self) -> dict[str, object]:
        return {
            "number": self.number,
            "tally": asdict(self.stats),
            "input": self.task_digest,
            "tokens": self.tokens,
            "xxh3": self.xxh3,
            "busy_s": self.busy_s,
            "encode_s": self.encode_s,
            "fault": self.mismatch,
        }

    @classmethod
    def load(cls, parts_dir: Path, number: int) -> ShardPart | None:
        """Return the finished part with this number, None if it is missing or damaged."""
        try:
            record = json.loads(part_file(parts_dir, number, "json").read_bytes())
            stats = ReadStats(**record.pop("tally"))
            task_digest, mismatch = record.pop("input"), record.pop("fault")
            part = cls(stats=stats, task_digest=task_digest, mismatch=mismatch, **record)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        for suffix, expected in part.xxh3.items():
            path = part_file(parts_dir, number, suffix)
            if not path.exists() or hash_file(path, xxhash.xxh3_128()) != expected:
                return None
        return part


def part_file(parts_dir: Path, number: int, suffix: str) -> Path:
    """Return the path of one file of a part."""
    return parts_dir / f"{number:06d}.{suffix}"


def make_part(
    config: WorkerConfig,
    encoder: VerifiedEncoder | None,
    task: CorpusTask,
    progress: Callable[[int], None],
) -> ShardPart:
    """Read, check, hash and encode one task; writes all files of its part, or none.

    `progress` is called with the bytes of text of each batch. Raises DataError, OSError.
    """
    part = ShardPart(task.number, ReadStats(), task.digest)
    t0, encode_before_s = time.perf_counter(), encoder.spent_s if encoder else 0.0
    with _PartWriter(config, task.number) as writer:
        for texts in read_batches(config.corpus, part.stats, task, BATCH_BYTES):
            if encoder is None:
                writer.add(texts, None, np.zeros(len(texts), "<i4"))
            else:
                # the first batch of each task is compared with the tokenizer's own library
                if part.tokens == 0 and (mismatch := encoder.find_mismatch(texts)):
                    part.mismatch = mismatch
                    return part
                try:
                    ids, lengths = encoder.encode(texts)
                except FastEncoderUnavailable as error:
                    part.mismatch = str(error)
                    return part
                writer.add(texts, _append_eod(ids, lengths, config), lengths + 1)
                part.tokens += len(ids) + len(lengths)
            progress(sum(map(len, texts)))
        part.encode_s = encoder.spent_s - encode_before_s if encoder else 0.0
        part.busy_s = time.perf_counter() - t0
        writer.finish(part)
    return part


def _append_eod(ids: np.ndarray, lengths: np.ndarray, config: WorkerConfig) -> bytes:
    """Return the concatenated ids as stored in a shard, with the eod id after each document.

    Raises DataError for an id out of range.
    """
    check_id_range(ids, config.vocab_size, config.corpus.label)
    dtype = dtype_for(config.vocab_size)
    stored = ids.astype(dtype).data.cast("B")
    edges = [0, *(np.cumsum(lengths) * dtype.itemsize).tolist()]
    documents = map(stored.__getitem__, map(slice, edges, edges[1:]))
    return np.array(config.eod_id, dtype).tobytes().join([*documents, b""])


class _PartWriter:
    """Writes the files of a part under temporary names, which `finish` replaces.

    The files are not fsynced: after a power failure, their hashes detect what was lost.
    """

    def __init__(self, config: WorkerConfig, number: int):
        self.seed, self.parts_dir, self.number = config.seed, config.parts_dir, number
        suffixes = ("ids", "docs") if config.encoder is not None else ("docs",)
        self._paths = {suffix: self._temporary(suffix) for suffix in suffixes}
        self._files = {suffix: path.open("wb") for suffix, path in self._paths.items()}
        self._hashes = {suffix: xxhash.xxh3_128() for suffix in suffixes}

    def _temporary(self, suffix: str) -> Path:
        return part_file(self.parts_dir, self.number, f"{suffix}.{os.getpid()}.tmp")

    def add(self, texts: list[bytes], ids: bytes | None, lengths: np.ndarray) -> None:
        """Append a batch of documents; `lengths` in tokens, int [len(texts)]."""
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

    def finish(self, part: ShardPart) -> None:
        """Rename the files to their final names, then write the record."""
        part.xxh3 = {suffix: digest.hexdigest() for suffix, digest in self._hashes.items()}
        for suffix, file in self._files.items():
            file.close()
            self._paths[suffix].replace(part_file(self.parts_dir, self.number, suffix))
        record = self._paths["json"] = self._temporary("json")
        record.write_text(json.dumps(part.to_record()))
        record.replace(part_file(self.parts_dir, self.number, "json"))

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk was already reported by a write
                file.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)


def read_table(parts_dir: Path, part: ShardPart) -> np.ndarray:
    """Memory-map the document table of a part, DOCUMENT [documents]; a part has no size limit."""
    return _map(part_file(parts_dir, part.number, "docs"), DOCUMENT)


def iter_tables(parts_dir: Path, parts: Iterable[ShardPart]) -> Iterator[np.ndarray]:
    """Yield the documents of these parts, DOCUMENT [up to TABLE_BLOCK]."""
    for part in parts:
        table = read_table(parts_dir, part)
        for start in range(0, len(table), TABLE_BLOCK):
            yield table[start : start + TABLE_BLOCK]


def read_ids(parts_dir: Path, part: ShardPart, dtype: np.dtype) -> np.ndarray:
    """Memory-map the ids of a part, [tokens]."""
    return _map(part_file(parts_dir, part.number, "ids"), dtype)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # mmap rejects empty files
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r").view(np.ndarray)
