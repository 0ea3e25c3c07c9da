"""The weights in a directory of Hugging Face, by FGPT's logical names; nothing is copied first."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgpt.checkpoint.boxes import Box
from fgpt.checkpoint.tensor_file import TensorFile
from fgpt.config.schema import ModelConfig
from fgpt.errors import CheckpointError
from fgpt.inference.hf_config import from_hf_config
from fgpt.inference.hf_layout import Family, HfTensor, Rows, hf_tensors
from fgpt.inference.source import SourceFacts

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FACTS = "fgpt"
"""Key of config.json with the facts of the training run."""
_END_BYTES = 2**20
_HUB_CACHE = re.compile(r"models--((?:[\w.-]+?--)?[\w.-]+)")
"""The directory of one model in the Hub's cache: models--OWNER--NAME."""
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Ends of names of tensors that older versions of transformers saved and do not need."""


class HuggingFaceWeights:
    """A `WeightSource` of safetensors files that transformers wrote or would read."""

    def __init__(self, path: Path):
        """Raises CheckpointError unless it is complete and computes what FGPT computes."""
        self.path = path
        values = read_json_object(path / CONFIG)
        self.family: Family
        self.config: ModelConfig
        self.family, self.config = from_hf_config(values, str(path / CONFIG))
        self.facts = _facts(values.get(FACTS), path)
        self._files = self._open_files()
        self._tensors = hf_tensors(self.family, self.config)
        # the files of a base model have no prefix
        self._has_prefix = any(name.startswith(self.family.prefix) for name in self._files)
        self._check_tensors()
        self._rows: dict[str, list[tuple[str, HfTensor, Rows]]] = defaultdict(list)
        for name, tensor in self._tensors.items():
            for rows in tensor.rows:
                self._rows[rows.name].append((self._name_in_files(name), tensor, rows))
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: _logical_shape(parts) for name, parts in self._rows.items()
        }

    def fingerprint(self) -> str:
        """SHA-256 of config.json, and of the sizes, the first and the last MiB of the files of
        weights. Raises OSError.
        """
        digest = hashlib.sha256((self.path / CONFIG).read_bytes())
        for path in sorted({file.path for file in self._files.values()}):
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(size.to_bytes(8, "little") + file.read(_END_BYTES))
                file.seek(max(0, size - _END_BYTES))
                digest.update(file.read(_END_BYTES))
        return digest.hexdigest()

    def names(self) -> list[str]:
        """The logical names of all weights."""
        return list(self._rows)

    def read(self, name: str) -> Tensor:
        """Return a whole logical tensor in its stored dtype. Raises CheckpointError."""
        self._check_name(name)
        shape = self.shapes[name]
        stored, *_ = self._rows[name][0]
        full = torch.empty(shape, dtype=self._files[stored].dtype(stored))
        self.copy(name, Box((0,) * len(shape), shape), full)
        return full

    @torch.no_grad()
    def copy(self, name: str, box: Box, target: Tensor) -> None:
        """Copy a box of a logical tensor into `target`, of its sizes, reading nothing else.

        Raises CheckpointError.
        """
        self._check_name(name)
        begin, end = box.offsets[0], box.ends[0]
        rest = tuple(slice(o, e) for o, e in zip(box.offsets[1:], box.ends[1:], strict=True))
        for stored, tensor, rows in self._rows[name]:
            first, last = max(begin, rows.begin), min(end, rows.begin + rows.n)
            if first >= last:
                continue
            there = slice(*(row - rows.begin + rows.hf_begin for row in (first, last)))
            slices = (*rest, there) if tensor.is_transposed else (there, *rest)
            values = self._files[stored].read(stored, slices)
            values = values.t() if tensor.is_transposed else values
            target[first - begin : last - begin].copy_(values)

    def _check_name(self, name: str) -> None:
        if name not in self._rows:
            raise CheckpointError(f"{self.path}: has no {name}")

    def _name_in_files(self, name: str) -> str:
        return name if self._has_prefix else name.removeprefix(self.family.prefix)

    def _open_files(self) -> dict[str, TensorFile]:
        """Name of each tensor -> its file. Raises CheckpointError."""
        index = self.path / INDEX
        if index.exists():
            places = read_json_object(index).get("weight_map")
            if not isinstance(places, dict) or not all(map(_is_name, places.values())):
                raise CheckpointError(f"{index}: has no weight_map; export the model again")
        elif (self.path / SINGLE).exists():
            opened = _open_file(self.path / SINGLE)
            return dict.fromkeys(opened.keys(), opened)
        else:
            raise CheckpointError(_no_weights(self.path))
        files: dict[str, TensorFile] = {}
        for file in sorted(set(places.values())):
            if not (self.path / file).is_file():
                raise CheckpointError(f"{self.path / file}: missing, {INDEX} names it")
            files[file] = _open_file(self.path / file)
        for name, file in places.items():
            if name not in files[file].keys():
                raise CheckpointError(f"{self.path / file}: has no {name}, {INDEX} says it has")
        return {name: files[file] for name, file in places.items()}

    def _check_tensors(self) -> None:
        """Raise CheckpointError unless the files have the tensors of the model, and no others."""
        needed = {self._name_in_files(name): tensor for name, tensor in self._tensors.items()}
        ignored = {"lm_head.weight"} if self.config.tied_head else set()
        for name in sorted(needed.keys() | self._files.keys()):
            if name not in self._files:
                raise CheckpointError(f"{self.path}: has no {name}, which {CONFIG} calls for")
            if name not in needed:
                if name in ignored or name.endswith(_BUFFERS):
                    continue
                raise CheckpointError(
                    f"{self.path}: {name} is no tensor of a {self.family.architecture}: FGPT would"
                    " not compute what this model does"
                )
            shape, expected = self._files[name].shape(name), needed[name].shape
            if shape != expected:
                raise CheckpointError(
                    f"{self.path}: {name} is {list(shape)}, by {CONFIG} it is {list(expected)}"
                )
            if self._files[name].dtype(name) not in (torch.float32, torch.bfloat16, torch.float16):
                raise CheckpointError(
                    f"{self.path}: {name} is quantized: name a directory in float32, bfloat16 or"
                    " float16"
                )


def _open_file(path: Path) -> TensorFile:
    """Open a file of weights; in the Hub's cache it is a link. Raises CheckpointError."""
    try:
        return TensorFile(Path(os.path.realpath(path)))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; check its permissions, or copy it again"
        ) from error


def _logical_shape(parts: Sequence[tuple[str, HfTensor, Rows]]) -> tuple[int, ...]:
    """The shape of the logical tensor that consists of these rows."""
    n_rows = sum(rows.n for *_, rows in parts)
    _, tensor, _ = parts[0]
    return (n_rows, *(tensor.shape[:1] if tensor.is_transposed else tensor.shape[1:]))


def _is_name(value: object) -> bool:
    """Whether it is the name of a file in the same directory."""
    return isinstance(value, str) and Path(value).name == value


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; export the model again") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no JSON: {error}; export the model again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is no object; export the model again")
    return value


def _no_weights(path: Path) -> str:
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return (
            f"{path}: {pickles[0]} is a pickle, which FGPT never loads: convert it with"
            f" transformers: AutoModelForCausalLM.from_pretrained({str(path)!r})"
            ".save_pretrained('OUT')"
        )
    return f"{path}: has {CONFIG} and no {SINGLE}: copy the weights there, or export them again"


def _facts(values: object, path: Path) -> SourceFacts:
    """The facts that `fgpt convert` wrote; of the Hub's cache, the name of the model."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "step": int,
        "tokens": int,
        "valid_loss": (int, float),
        "origin": str,
        "base_model": str,
    }
    if isinstance(values, dict):
        return SourceFacts(
            **{n: values[n] for n, k in kinds.items() if isinstance(values.get(n), k)}
        )
    names = (_HUB_CACHE.fullmatch(part) for part in reversed(path.absolute().parts))
    return SourceFacts(base_model=next((m[1].replace("--", "/") for m in names if m), ""))
