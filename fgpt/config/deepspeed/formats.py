"""Reads a DeepSpeed JSON as DeepSpeed does, and recognizes other programs' files by their keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgpt.config.deepspeed.keys import TOP
from fgpt.errors import ConfigError, ConfigIssue
from fgpt.utils.strict_json import parse, read_object, read_text

_OTHERS: tuple[tuple[frozenset[str], str, str], ...] = (
    (
        frozenset({"compute_environment", "distributed_type", "deepspeed_config"}),
        "an accelerate configuration",
        "give the DeepSpeed JSON that its deepspeed_config_file names, or one of ds_configs/",
    ),
    (
        frozenset(
            {"pipe-parallel-size", "model-parallel-size", "pipe_parallel_size", "num-layers"}
            | {"model_parallel_size", "hidden-size", "num-attention-heads", "seq-length"}
        ),
        "a GPT-NeoX configuration",
        "copy its DeepSpeed keys (optimizer, zero_optimization, fp16, ...) into a JSON; --tp, --pp"
        " and the run file have the rest",
    ),
    (
        frozenset({"per_device_train_batch_size", "output_dir", "num_train_epochs"}),
        "Hugging Face training arguments",
        "give the DeepSpeed JSON that its `deepspeed` names; --auto hf has the Trainer's values",
    ),
    (
        frozenset({"architectures", "model_type", "hidden_size", "transformers_version"}),
        "a Hugging Face model configuration",
        "give a DeepSpeed JSON; the run file has the model",
    ),
    (
        frozenset({"model", "data", "parallel", "train", "eval", "sample", "speed"}),
        "a run file of FGPT",
        "give it as --run_file, and a DeepSpeed JSON as --ds_config",
    ),
)
"""Keys of another program's file, what it is, and the remedy. Two keys decide, or one if none is
DeepSpeed's. The run file shares its words with too many programs: it is the last."""


def read_deepspeed(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; like DeepSpeed, take hjson's comments and trailing commas.

    Raises ConfigError.
    """
    try:
        return read_object(path)
    except ConfigError as error:
        text = read_text(path)
        if "{" not in text or not text.lstrip().startswith(("{", "#", "/")):
            raise _not_json(path, text, error) from None
        try:
            return _read_hjson(text, str(path))
        except (ValueError, RecursionError):
            raise error from None


def _read_hjson(text: str, where: str) -> dict[str, Any]:
    import hjson

    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(name for name in dict.fromkeys(names) if names.count(name) > 1)
        return dict(pairs)

    value = hjson.loads(text, object_pairs_hook=collect)
    if repeated:
        what = f"{', '.join(map(repr, repeated))} is written more than once"
        raise ConfigError([ConfigIssue(where, what, "keep one of them")])
    if not isinstance(value, dict):
        raise ValueError("not an object")
    parsed = parse(json.dumps(value), where)
    assert isinstance(parsed, dict)
    return parsed


def _not_json(path: Path, text: str, error: ConfigError) -> ConfigError:
    """The error for text that does not begin like a JSON object."""
    keys = [line.partition(":")[0].strip(" \"'-") for line in text.splitlines() if ":" in line]
    other = _recognized(dict.fromkeys(keys))
    if other:
        return ConfigError([ConfigIssue(str(path), f"is {other[0]}", other[1])])
    if text.lstrip().startswith("[") and " = " in text:
        fix = 'write the same keys as a JSON: { "train_batch_size": 8, ... }'
        return ConfigError([ConfigIssue(str(path), "is TOML, not JSON", fix)])
    if len(keys) > 1 and not text.lstrip().startswith("["):
        fix = 'write the same keys as a JSON: { "train_batch_size": 8, ... }'
        return ConfigError([ConfigIssue(str(path), "is YAML, not JSON", fix)])
    return error


def refuse_other_formats(tree: Mapping[str, Any], file: str) -> None:
    """Raise ConfigError with one line for another program's file."""
    if other := _recognized(tree):
        raise ConfigError([ConfigIssue(file, f"is {other[0]}, not a DeepSpeed JSON", other[1])])


def _recognized(tree: Mapping[str, Any]) -> tuple[str, str] | None:
    """(what the file is, remedy), or None for a DeepSpeed JSON."""
    for keys, name, fix in _OTHERS:
        has_own = bool(tree.keys() & TOP.keys())
        if len(keys & tree.keys()) >= (2 if has_own and "parallel" not in keys else 1):
            return name, fix
    return None
