"""The weights in a directory of Hugging Face, by FGPT's logical names; nothing is copied first."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from fgpt.checkpoint.boxes import Box
from fgpt.config.schema import ModelConfig
from fgpt.errors import CheckpointError
from fgpt.inference.hf_config import KEYS, from_hf_config
from fgpt.inference.hf_files import CONFIG, open_weight_files, read_json_object
from fgpt.inference.hf_layout import Family, HfTensor, Rows, hf_tensors
from fgpt.inference.source import SourceFacts
from fgpt.utils.keys import Key

FACTS = "fgpt"
"""Key of config.json with the facts of the training run."""
_FACTS = {
    "step": Key("int", low=0),
    "tokens": Key("int", low=0),
    "valid_loss": Key("number"),
    "origin": Key("string"),
    "base_model": Key("string"),
}
_END_BYTES = 2**20
_ROWS = 1024
"""Rows of two tensors that are compared at a time."""
_MODEL_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)
_HUB_CACHE = re.compile(r"models--((?:[\w.-]+?--)?[\w.-]+)", re.ASCII)
"""The directory of one model in the Hub's cache: models--OWNER--NAME."""
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Ends of names of tensors that older versions of transformers saved and do not need."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HuggingFaceWeights:
    """A `WeightSource` of safetensors files that transformers wrote or would read."""

    def __init__(self, path: Path):
        """Raises CheckpointError unless it is complete and computes what FGPT computes."""
        self.path = path
        values = read_json_object(path / CONFIG)
        self.family: Family
        self.family, config = from_hf_config(values, str(path / CONFIG))
        self.facts = _facts(values.get(FACTS), path)
        self._files = open_weight_files(path)
        # the files of a base model have no prefix
        self._has_prefix = any(name.startswith(self.family.prefix) for name in self._files)
        self.warnings: list[str] = []
        """What the user should know of these files, a line each."""
        self._embedding = f"{self.family.names['embedding.token']}.weight"
        self._head = f"{self.family.names['head']}.weight"
        self._is_head_alone = False
        self._check_sizes(config)
        self.config: ModelConfig = self._with_stored_head(config)
        self.stored: Mapping[str, HfTensor] = {
            self._name_in_files(name): tensor
            for name, tensor in hf_tensors(self.family, self.config).items()
        }
        """The tensors of the model by their names in the files."""
        self._dtypes = self._checked_dtypes()
        self._rows: dict[str, list[tuple[str, HfTensor, Rows]]] = defaultdict(list)
        for name, tensor in self.stored.items():
            for rows in tensor.rows:
                self._rows[rows.name].append((name, tensor, rows))
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
        """Return a whole logical tensor in its stored dtype; of parts in several, in one that has
        all their values. Raises CheckpointError.
        """
        self._check_name(name)
        shape = self.shapes[name]
        dtypes = {self._dtypes[stored] for stored, *_ in self._rows[name]}
        full = torch.empty(shape, dtype=reduce(torch.promote_types, dtypes))
        self.copy(name, Box((0,) * len(shape), shape), full)
        return full

    def read_stored(self, stored: str) -> Tensor:
        """Return a tensor of the files as it is there. Raises CheckpointError."""
        return self._files[stored].read(stored)

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
        if name == self._embedding and self._is_head_alone:
            return self._head
        return name if self._has_prefix else name.removeprefix(self.family.prefix)

    def _check_sizes(self, config: ModelConfig) -> None:
        """Raise CheckpointError if config.json calls for more than the files have: the tables of
        such a model could take all memory.
        """
        keys = KEYS[self.family.model_type]
        prefix = self._name_in_files(self.family.block)
        names = [name for name in self._files if name.startswith(prefix)]
        numbers = {name.removeprefix(prefix).partition(".")[0] for name in names}
        n_block = sum(map(str.isdecimal, numbers))
        if n_block != config.n_layer:
            raise CheckpointError(
                f"{self.path}: has tensors of {n_block} blocks ({prefix}N.), by {CONFIG}"
                f" {keys['n_layer'][0]} is {config.n_layer}"
            )
        sizes = [file.shape(name) for name, file in self._files.items()]
        widest = max((n for shape in sizes if 0 not in shape for n in shape), default=0)
        fields = ["vocab_size", "d_model", "n_head", "n_kv_head", "d_head", "d_ff"]
        for field in fields + ["max_seq_len"] * (config.position == "learned"):
            value = getattr(config, field)
            if value is not None and value > widest:
                raise CheckpointError(
                    f"{self.path}: no tensor has more than {widest} rows or columns, by {CONFIG}"
                    f" {keys.get(field, (field,))[0]} is {value}"
                )

    def _with_stored_head(self, config: ModelConfig) -> ModelConfig:
        """As transformers 5: a head that config.json ties but that is stored with other values is
        not tied; one that is stored without the embedding is the embedding too.
        """
        embedding = self._name_in_files(self._embedding)
        if not config.tied_head or self._head not in self._files:
            return config
        if embedding not in self._files:
            self._is_head_alone = True
            return config
        if self._is_equal(embedding, self._head):
            return config
        self.warnings.append(
            f"{self.path / CONFIG}: tie_word_embeddings is true, but {self._head} and {embedding}"
            " differ: both are used, as in transformers 5"
        )
        return replace(config, tied_head=False)

    def _is_equal(self, first: str, second: str) -> bool:
        """Whether two matrices have the same values; a part at a time is in memory."""
        files, shape = self._files, self._files[first].shape(first)
        if shape != files[second].shape(second):
            return False
        parts = [(slice(i, i + _ROWS),) for i in range(0, shape[0] if shape else 0, _ROWS)]
        return all(
            torch.equal(files[first].read(first, p).float(), files[second].read(second, p).float())
            for p in parts
        )

    def _checked_dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype of each stored tensor. Raises CheckpointError unless the files have the
        tensors of the model, and no others.
        """
        ignored = {self._head} if self.config.tied_head else set()
        dtypes: dict[str, torch.dtype] = {}
        for name in sorted(self.stored.keys() | self._files.keys()):
            if name not in self._files:
                raise CheckpointError(f"{self.path}: has no {name}, which {CONFIG} calls for")
            if name not in self.stored:
                if name in ignored or name.endswith(_BUFFERS):
                    continue
                raise CheckpointError(
                    f"{self.path}: {name} is no tensor of a {self.family.architecture}: FGPT would"
                    " not compute what this model does"
                )
            shape, expected = self._files[name].shape(name), self.stored[name].shape
            if shape != expected:
                raise CheckpointError(
                    f"{self.path}: {name} is {list(shape)}, by {CONFIG} it is {list(expected)}"
                )
            dtypes[name] = self._files[name].read(name, (slice(0, 0),)).dtype
            if dtypes[name] not in _DTYPES:
                raise CheckpointError(
                    f"{self.path}: {name} is quantized ({_word(dtypes[name])}): name a directory in"
                    " float32, bfloat16 or float16"
                )
        if wide := [name for name, dtype in dtypes.items() if dtype == torch.float64]:
            self.warnings.append(
                f"{self.path}: {len(wide)} of {len(dtypes)} tensors ({wide[0]}, ...) are float64:"
                " FGPT rounds them to float32"
            )
        return dtypes


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _logical_shape(parts: Sequence[tuple[str, HfTensor, Rows]]) -> tuple[int, ...]:
    """The shape of the logical tensor that consists of these rows."""
    n_rows = sum(rows.n for *_, rows in parts)
    _, tensor, _ = parts[0]
    return (n_rows, *(tensor.shape[:1] if tensor.is_transposed else tensor.shape[1:]))


def _facts(values: object, path: Path) -> SourceFacts:
    """The facts that `fgpt convert` wrote; of the Hub's cache, the name of the model."""
    if isinstance(values, dict):
        known = {n: values[n] for n, key in _FACTS.items() if key.complaint(values.get(n)) is None}
        if not _MODEL_NAME.fullmatch(known.get("base_model", "")):
            known["base_model"] = ""
        return SourceFacts(**known)
    names = (_HUB_CACHE.fullmatch(part) for part in reversed(path.absolute().parts))
    return SourceFacts(base_model=next((m[1].replace("--", "/") for m in names if m), ""))
