"""One rank's file of a checkpoint: safetensors, hashed while it is written, read by slices.

A key names a box of a state of a parameter: `blocks.0.mlp.up.weight:exp_avg[0:64,0:256]`. States of
8 bits also have `...:scales`, one for each block of 256 values of the rank's flat tensor, and each
file has their `codebook:STATE`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fgpt.checkpoint.boxes import Box, boxes_of_range
from fgpt.engine.state import WEIGHT, StateTensor, Values
from fgpt.errors import CheckpointError
from fgpt.optim.quantized import BLOCK
from fgpt.utils.files import open_path, open_regular

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
"""torch's dtype -> its name in safetensors."""
CHUNK_BYTES = 2**20
"""Bytes that are hashed and written while the processor's cache has them. Writes of 2 MiB and more
take memory that a virtual machine may have given back to its host, and wait for it."""
WRITEBACK_BYTES = 2**25
"""Bytes after which the disk begins to write, so that the fsync at the end finds little to do."""


@dataclass(frozen=True)
class SavedFile:
    """One file of a checkpoint."""

    name: str
    """Name inside the checkpoint directory."""
    size_bytes: int
    """Bytes written."""
    sha256: str
    """Hash of the bytes, computed while writing."""


@dataclass(frozen=True)
class Part:
    """One tensor of a file."""

    key: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    source: StateTensor
    select: Callable[[Values], Tensor]
    """From the opened source to the elements [N]."""

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.sizes) * self.dtype.itemsize


class SavedBox(NamedTuple):
    """A box of a logical tensor in a file."""

    file: int
    """Number of the file in the manifest."""
    box: Box
    phase: int = 0
    """Index of the first element in its block of an 8-bit state."""


@dataclass
class TensorRecord:
    """A logical tensor in a file or in a checkpoint; all its states are in the same boxes."""

    shape: tuple[int, ...]
    states: dict[str, str]
    """Weight or optimizer state -> dtype."""
    boxes: list[SavedBox]

    def to_json(self) -> dict[str, Any]:
        """As in a manifest: a box is [file, offsets, sizes, phase]."""
        boxes = [[saved.file, *saved.box, saved.phase] for saved in self.boxes]
        return {"shape": self.shape, "states": self.states, "boxes": boxes}


def box_key(name: str, state: str, box: Box) -> str:
    """Return the key of a box of a parameter's state."""
    ranges = (f"{b}:{e}" for b, e in zip(box.offsets, box.ends, strict=True))
    return f"{name}:{state}[{','.join(ranges)}]"


def scales_key(key: str) -> str:
    """Return the key of the scales of an 8-bit box."""
    return f"{key}:scales"


def codebook_key(state: str) -> str:
    """Return the key of the values of an 8-bit state's codes."""
    return f"codebook:{state}"


def saved_tensors(
    name: str, states: dict[str, str], saved: SavedBox
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return key -> dtype and sizes of what a file has of a box of a parameter."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for state, dtype in states.items():
        key = box_key(name, state, saved.box)
        tensors[key] = dtype, saved.box.sizes
        if dtype == "U8":
            tensors[scales_key(key)] = "F32", (-(-(saved.phase + saved.box.n) // BLOCK),)
            tensors[codebook_key(state)] = "F32", (256,)
    return tensors


def parts_of(tensors: Sequence[StateTensor]) -> tuple[list[Part], dict[str, TensorRecord]]:
    """Return what this rank writes, in the order of the file, and its tensors by logical name."""
    parts: list[Part] = []
    records: dict[str, TensorRecord] = {}
    codebooks: dict[str, Part] = {}
    for tensor in tensors:
        for fragment in tensor.fragments:
            if not fragment.is_written:
                continue
            shard = fragment.shard
            record = records.setdefault(shard.name, TensorRecord(shard.shape, {}, []))
            record.states[tensor.state] = DTYPE_NAMES[tensor.dtype]
            for local, first in boxes_of_range(shard.sizes, fragment.begin, fragment.end):
                box, start = local.moved(shard.offsets), fragment.offset + first - fragment.begin
                if tensor.state == WEIGHT:
                    record.boxes.append(SavedBox(0, box, start % BLOCK))
                key = box_key(shard.name, tensor.state, box)
                elements = partial(_elements, start=start, n=box.n)
                parts.append(Part(key, tensor.dtype, box.sizes, tensor, elements))
                if tensor.dtype == torch.uint8:
                    begin, end = start // BLOCK, -(-(start + box.n) // BLOCK)
                    scales = partial(_scales, begin=begin, end=end)
                    sizes = (end - begin,)
                    parts.append(Part(scales_key(key), torch.float32, sizes, tensor, scales))
                    book = codebook_key(tensor.state)
                    codebooks[book] = Part(book, torch.float32, (256,), tensor, _codebook)
    # the largest elements first: then all are aligned
    parts += codebooks.values()
    return sorted(parts, key=lambda part: -part.dtype.itemsize), records


def _elements(values: Values, start: int, n: int) -> Tensor:
    return values.flat[start : start + n]


def _scales(values: Values, begin: int, end: int) -> Tensor:
    assert values.scales is not None
    return values.scales[begin:end]


def _codebook(values: Values) -> Tensor:
    assert values.codebook is not None
    return values.codebook


def file_header(parts: Iterable[Part]) -> bytes:
    """Return the header of a safetensors file of these parts, in this order."""
    return tensor_header((part.key, part.dtype, part.sizes) for part in parts)


def tensor_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: dict[str, str] | None = None,
) -> bytes:
    """Return the header of a safetensors file of tensors (key, dtype, shape), in this order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for key, dtype, sizes in tensors:
        begin, end = end, end + math.prod(sizes) * dtype.itemsize
        header[key] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": sizes,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def stream(parts: Sequence[Part]) -> Iterator[Tensor]:
    """Yield the values of each part, on its device; those of one source are opened once."""
    i = 0
    while i < len(parts):
        source = parts[i].source
        with source.open() as values:
            while i < len(parts) and parts[i].source is source:
                yield parts[i].select(values)
                i += 1


def copy_to_host(parts: Sequence[Part], buffer: Tensor) -> None:
    """Copy the parts one after the other into a buffer, uint8 [sum of their bytes]."""
    begin = 0
    for part, values in zip(parts, stream(parts), strict=True):
        target = buffer[begin : begin + part.n_bytes].view(part.dtype)
        target.copy_(values.reshape(-1), non_blocking=True)
        begin += part.n_bytes
    if buffer.is_pinned():
        torch.cuda.current_stream().synchronize()


def write_file(path: Path, header: bytes, data: Iterable[Tensor]) -> SavedFile:
    """Write a new file of a header and tensors, and fsync it. Raises OSError (disk full, ...)."""
    digest, size, begun = hashlib.sha256(), 0, 0
    with open(path, "xb", buffering=0) as file:
        for view in _chunks(header, data):
            digest.update(view)
            size += len(view)
            while view:  # write(2) writes less when the disk is nearly full
                view = view[file.write(view) :]
            if size - begun >= WRITEBACK_BYTES:
                _begin_writeback(file.fileno(), begun, size)
                begun = size
        os.fsync(file.fileno())
    return SavedFile(path.name, size, digest.hexdigest())


def _begin_writeback(descriptor: int, begin: int, end: int) -> None:
    """Have the disk write these bytes of a file meanwhile, where the system offers it.

    Linux does so when asked to forget them, and forgets only what it has written by then.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a hint; fsync reports errors of the disk
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _chunks(header: bytes, data: Iterable[Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in data:
        view = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(view), CHUNK_BYTES):
            yield view[begin : begin + CHUNK_BYTES]


class TensorFile:
    """A file that was written by `write_file`, in a memory map."""

    def __init__(self, path: Path):
        """Raises CheckpointError if it is no safetensors file, OSError if it cannot be read."""
        self.path = path
        with open_regular(path) as file:
            try:
                self._file: Any = safe_open(open_path(file, path), framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{path}: no safetensors file: {error}") from error

    def keys(self) -> set[str]:
        """The keys of the file's tensors."""
        return set(self._file.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor of the file."""
        return tuple(self._file.get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype | None:
        """The dtype of a tensor of the file; None for one that FGPT does not write."""
        name = self._file.get_slice(key).get_dtype()
        return next((dtype for dtype, known in DTYPE_NAMES.items() if known == name), None)

    def read(self, key: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """Return a tensor of the file, or a part of it, copied. Raises CheckpointError."""
        try:
            whole = self._file.get_slice(key)
            values: Tensor = whole[slices] if slices else whole[:]
        except (SafetensorError, KeyError, ValueError, IndexError) as error:
            raise CheckpointError(f"{self.path}: {key}: {error}") from error
        return values
