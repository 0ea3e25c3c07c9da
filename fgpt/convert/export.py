"""FGPT -> Hugging Face: safetensors, config.json, tokenizer files, generation_config.json, card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgpt import __version__
from fgpt.checkpoint.boxes import Box
from fgpt.checkpoint.tensor_file import tensor_header, write_file
from fgpt.errors import CheckpointError
from fgpt.inference.hf_config import to_hf_config
from fgpt.inference.hf_files import CONFIG, INDEX, SINGLE
from fgpt.inference.hf_layout import HfTensor, family_for, hf_tensors
from fgpt.inference.hf_weights import FACTS
from fgpt.inference.source import WeightSource, without_folders
from fgpt.tokenizer import hf_tokenizer
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.hf_tokenizer import HFTokenizer

MAX_SHARD_BYTES = 5 * 10**9
"""Largest file of weights, unless one tensor is larger."""


def export(
    source: WeightSource,
    folder: Path,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write everything but the model card into an existing directory.

    One tensor is in memory at a time. All rows of the embedding are kept, also those beyond the
    tokenizer's ids, so that a round trip changes nothing. Raises CheckpointError for a model that
    transformers does not have, or a weight that `dtype` cannot represent; OSError.
    """
    family = family_for(source.config)
    tensors = hf_tensors(family, source.config)
    _write_weights(source, tensors, folder, dtype, max_shard_bytes)
    ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
    if tokenizer is not None:
        ids = {"bos_token_id": _bos_id(tokenizer), "eos_token_id": tokenizer.eod_id}
    facts = source.facts
    known = {"step": facts.step, "tokens": facts.tokens, "valid_loss": facts.valid_loss}
    lineage = {"origin": without_folders(facts.origin), "base_model": facts.base_model}
    config = to_hf_config(source.config, family) | ids
    config |= {"pad_token_id": None, "dtype": str(dtype).removeprefix("torch.")}
    config[FACTS] = {
        "version": __version__,
        "tokenizer": None if tokenizer is None else tokenizer.file_name,
        **known,
        **lineage,
    }
    _write_json(folder / CONFIG, config)
    _write_json(folder / "generation_config.json", ids | {"do_sample": True})
    if tokenizer is not None:
        _write_tokenizer(tokenizer, folder, source.config.max_seq_len)


def _write_weights(
    source: WeightSource,
    tensors: Mapping[str, HfTensor],
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    # 1. which tensors are in which file
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in tensors.items():
        n_bytes = torch.Size(tensor.shape).numel() * dtype.itemsize
        total += n_bytes
        if shards[-1] and size + n_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
    numbered = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = numbered if len(shards) > 1 else [SINGLE]
    # 2. the files
    for file, names in zip(files, shards, strict=True):
        entries = ((name, dtype, tensors[name].shape) for name in names)
        header = tensor_header(entries, {"format": "pt"})
        write_file(folder / file, header, _converted(source, tensors, names, dtype))
    # 3. the index
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _converted(
    source: WeightSource, tensors: Mapping[str, HfTensor], names: list[str], dtype: torch.dtype
) -> Iterator[Tensor]:
    for name in names:
        values = hf_tensor(source, tensors[name], dtype)
        if not values.isfinite().all():
            unrounded = hf_tensor(source, tensors[name], torch.float32)
            check_finite(unrounded, tensors[name].rows[0].name, source)
            raise CheckpointError(
                f"{source.path}: {name} has values that {dtype} cannot represent: export it with"
                f" --dtype {'fp32' if dtype == torch.bfloat16 else 'bf16 or fp32'}"
            )
        yield values


def hf_tensor(source: WeightSource, tensor: HfTensor, dtype: torch.dtype) -> Tensor:
    """Return one of transformers' tensors from the logical ones, contiguous."""
    shape = tensor.shape[::-1] if tensor.is_transposed else tensor.shape
    full = torch.empty(shape, dtype=dtype)
    for rows in tensor.rows:
        box = Box((rows.begin, *(0,) * (len(shape) - 1)), (rows.n, *shape[1:]))
        target = full[rows.hf_begin : rows.hf_begin + rows.n]
        if rows.factor == 1:
            source.copy(rows.name, box, target)
        else:
            unrounded = torch.empty(target.shape)
            source.copy(rows.name, box, unrounded)
            target.copy_(unrounded * rows.factor)
    return full.t().contiguous() if tensor.is_transposed else full


def as_exported(
    name: str, values: Tensor, tensors: Mapping[str, HfTensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a logical tensor as the export has it, in `dtype`, and what it stands for in FGPT's
    model, in float32: without the factors of `Rows`.
    """
    factors = torch.ones(values.shape[0], *(1,) * (values.dim() - 1))
    for tensor in tensors.values():
        for rows in tensor.rows:
            if rows.name == name:
                factors[rows.begin : rows.begin + rows.n] = rows.factor
    exported = (values * factors).to(dtype)
    return exported, exported.float() / factors


def check_finite(values: Tensor, name: str, source: WeightSource) -> None:
    """Raise CheckpointError if a weight of the source has NaN or infinity in it."""
    if not values.isfinite().all():
        raise CheckpointError(
            f"{source.path}: weight {name} is not finite in float32: the weights are damaged, or"
            " their training diverged; name others"
        )


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write the tokenizer's file and what transformers wants to know of it; transformers reads a
    SentencePiece model from a tokenizer.json.
    """
    tokenizer.save(folder)
    if tokenizer.library_name == "sentencepiece":
        from fgpt.convert.sentencepiece_json import tokenizer_json
        from fgpt.tokenizer.sentencepiece_model import SentencePieceTokenizer

        assert isinstance(tokenizer, SentencePieceTokenizer)
        if (text := tokenizer_json(tokenizer)) is not None:
            (folder / hf_tokenizer.FILE_NAME).write_text(text, encoding="utf-8")
    elif (
        isinstance(tokenizer, HFTokenizer) and tokenizer.template_prefix != tokenizer.prompt_prefix
    ):
        # the model was trained on other texts than the tokenizer was made for
        text = json.dumps(tokenizer.settings | {"post_processor": None}, ensure_ascii=False)
        (folder / hf_tokenizer.FILE_NAME).write_text(text, encoding="utf-8")
    bos = tokenizer.id_to_token(_bos_id(tokenizer))
    special = {"bos_token": bos, "eos_token": tokenizer.eod}
    if tokenizer.unk_id is not None:
        special["unk_token"] = tokenizer.id_to_token(tokenizer.unk_id)
    settings: dict[str, Any] = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "add_bos_token": bool(tokenizer.prompt_prefix),
        "clean_up_tokenization_spaces": False,
        # the name of a special token in a text is text, as in training
        "split_special_tokens": tokenizer.special_tokens == "text",
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)


def _bos_id(tokenizer: Tokenizer) -> int:
    """What a text begins with; a document of FGPT's own data follows the end of another one."""
    return tokenizer.prompt_prefix[0] if tokenizer.prompt_prefix else tokenizer.eod_id


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
