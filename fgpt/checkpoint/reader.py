"""Reads logical tensors out of a checkpoint of any layout; no engine and no DeepSpeed needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fgpt.checkpoint.boxes import Box, boxes_of_range, make_up
from fgpt.checkpoint.directory import NAME, step_of
from fgpt.checkpoint.manifest import Manifest, check_file, check_names, read_manifest
from fgpt.checkpoint.tensor_file import (
    DTYPE_NAMES,
    TensorFile,
    TensorRecord,
    box_key,
    codebook_key,
    saved_tensors,
    scales_key,
)
from fgpt.engine.state import WEIGHT, StateTensor, Values
from fgpt.errors import CheckpointError
from fgpt.optim.quantized import dequantize, scale_of_each


class CheckpointReader:
    """The tensors of one checkpoint; files are opened when they are needed."""

    def __init__(self, path: Path, manifest: Manifest):
        """Raises CheckpointError if a tensor is incomplete."""
        self.path, self.manifest = path, manifest
        self._files: dict[int, TensorFile] = {}
        for name, record in manifest.tensors.items():
            exist = all(saved.file < len(manifest.files) for saved in record.boxes)
            if not exist or not make_up([saved.box for saved in record.boxes], record.shape):
                raise CheckpointError(f"{path}: the boxes of {name} do not make up the tensor")

    def check_file(self, number: int) -> None:
        """Raise CheckpointError unless a file has the tensors that the manifest says it has."""
        file = self._file(number)
        needed: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, record in self.manifest.tensors.items():
            for saved in record.boxes:
                if saved.file == number:
                    needed |= saved_tensors(name, record.states, saved)
        if missing := needed.keys() - file.keys():
            raise CheckpointError(f"{file.path}: has no {min(missing)}")
        for key, expected in needed.items():
            dtype = file.dtype(key)
            found = "another dtype" if dtype is None else DTYPE_NAMES[dtype], file.shape(key)
            if found != expected:
                kinds = [f"{name} {list(sizes)}" for name, sizes in (found, expected)]
                raise CheckpointError(
                    f"{file.path}: {key} is {kinds[0]}, the manifest says {kinds[1]}"
                )

    def read(self, name: str, state: str = WEIGHT) -> Tensor:
        """Return a whole tensor, float32 for 8-bit states. Raises CheckpointError."""
        record = self._record(name, state)
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(record.states[state])
        full = torch.empty(record.shape, dtype=dtype or torch.float32)
        self._copy(name, state, Box((0,) * full.dim(), record.shape), full, None)
        return full

    def copy(self, name: str, box: Box, target: Tensor, state: str = WEIGHT) -> None:
        """Copy the elements of a box into `target`, a tensor of its sizes of any dtype and device.

        Reads nothing else. Raises CheckpointError.
        """
        self._record(name, state)
        self._copy(name, state, box, target, None)

    def fill(self, tensors: Iterable[StateTensor]) -> None:
        """Fill the state tensors of an engine.

        Raises CheckpointError, also for values that are not finite: they would spread to all.
        """
        for tensor in tensors:
            self._fill(tensor)

    def _fill(self, tensor: StateTensor) -> None:
        with tensor.open() as values:
            for name, shape, box, target, bounds in targets(tensor, values):
                saved = self._record(name, tensor.state)
                if saved.shape != shape:
                    raise CheckpointError(
                        f"{self.path}: {name} is {list(saved.shape)} in the checkpoint,"
                        f" {list(shape)} in this run"
                    )
                self._copy(name, tensor.state, box, target, bounds)
                if not bool(torch.isfinite(target).all()):
                    raise CheckpointError(
                        f"{self.path}: {tensor.state} of {name} has values that are not finite:"
                        " name an earlier one, --resume PATH"
                    )

    def _record(self, name: str, state: str) -> TensorRecord:
        record = self.manifest.tensors.get(name)
        if record is None or state not in record.states:
            raise CheckpointError(f"{self.path}: has no {state} of {name}")
        return record

    @torch.no_grad()
    def _copy(self, name: str, state: str, box: Box, target: Tensor, bounds: Tensor | None) -> None:
        """Copy the elements of a box into `target`, a tensor of its sizes.

        `bounds`: also the scale of each element, for 8-bit states.
        """
        record = self.manifest.tensors[name]
        for number, saved, phase in record.boxes:
            common = box.common(saved)
            if common is None:
                continue
            file = self._file(number)
            key, here = box_key(name, state, saved), common.slices_in(box)
            if record.states[state] != "U8":
                values = file.read(key, common.slices_in(saved))
                magnitudes = values.abs() if bounds is not None else None
            else:
                scale = scale_of_each(file.read(scales_key(key)), phase, saved.n)
                codes = file.read(key).view(-1)
                values = dequantize(codes, file.read(codebook_key(state)), scale)
                values, magnitudes = (
                    t.view(saved.sizes)[common.slices_in(saved)] for t in (values, scale)
                )
            target[here].copy_(values)
            if bounds is not None and magnitudes is not None:
                bounds[here].copy_(magnitudes)

    def _file(self, number: int) -> TensorFile:
        if number not in self._files:
            self._files[number] = TensorFile(self.path / self.manifest.files[number].name)
        return self._files[number]


def targets(
    tensor: StateTensor, values: Values
) -> Iterator[tuple[str, tuple[int, ...], Box, Tensor, Tensor | None]]:
    """Yield (logical name, its shape, box, elements to fill [box.sizes], their bounds) for each box
    of an opened state tensor.
    """
    for fragment in tensor.fragments:
        shard = fragment.shard
        for local, first in boxes_of_range(shard.sizes, fragment.begin, fragment.end):
            start = fragment.offset + first - fragment.begin
            target, bounds = (
                None if flat is None else flat[start : start + local.n].view(local.sizes)
                for flat in (values.flat, values.bounds)
            )
            assert target is not None
            yield shard.name, shard.shape, local.moved(shard.offsets), target, bounds


def open_intact(path: Path, share: int = 0, shares: int = 1) -> CheckpointReader:
    """Open a checkpoint after comparing its files with its manifest.

    Of several `shares`, one reads every so-many-th file from number `share` on. Raises
    CheckpointError for damage, OSError if a file cannot be read.
    """
    manifest = read_manifest(path)
    if NAME.fullmatch(path.name) and step_of(path) != manifest.step:
        raise CheckpointError(f"{path}: is of step {manifest.step}")
    if share == 0:
        check_names(path, manifest.files)
    reader = CheckpointReader(path, manifest)
    for number in range(share, len(manifest.files), shares):
        check_file(path, manifest.files[number])
        reader.check_file(number)
    return reader
