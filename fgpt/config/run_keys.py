"""The run file's fields as `Key`s: types from the dataclasses' annotations, ranges from here."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fgpt.config.presets import PRESETS
from fgpt.config.schema import RunConfig
from fgpt.utils.keys import Key, Kind

_KINDS: Mapping[type, Kind] = {bool: "bool", int: "int", float: "number", str: "string"}

_POSITIVE: Mapping[str, Any] = {"low": 1}
_COUNT: Mapping[str, Any] = {"low": 0}
_ABOVE_ZERO: Mapping[str, Any] = {"low": 0, "open_low": True}
# torch.manual_seed takes more, but numpy's and the sampler's seeds are 64 bits without a sign.
_SEED: Mapping[str, Any] = {"low": 0, "high": 2**63 - 1}

RANGES: Mapping[str, Mapping[str, Any]] = {
    "model.preset": {"words": tuple(PRESETS)},
    "model.vocab_size": _POSITIVE,
    "model.max_seq_len": _POSITIVE,
    "model.n_layer": _POSITIVE,
    "model.d_model": _POSITIVE,
    "model.n_head": _POSITIVE,
    "model.d_head": _POSITIVE,
    "model.n_kv_head": _POSITIVE,
    "model.d_ff": _POSITIVE,
    "model.rotary_base": _ABOVE_ZERO,
    "model.norm_eps": _ABOVE_ZERO,
    "model.dropout": {"low": 0, "high": 1, "open_high": True},
    "model.init_std": _ABOVE_ZERO,
    "data.seq_len": _POSITIVE,
    "data.seed": _SEED,
    "data.prefetch": _COUNT,
    "parallel.tp": _POSITIVE,
    "parallel.pp": _POSITIVE,
    "parallel.cp": _POSITIVE,
    "train.steps": _POSITIVE,
    "train.seed": _SEED,
    "train.log_every": _POSITIVE,
    "train.max_skipped": _COUNT,
    "eval.every": _COUNT,
    "eval.batches": _POSITIVE,
    "checkpoint.every": _COUNT,
    "checkpoint.keep": {"low": 2},
    "sample.tokens": _COUNT,
    "sample.temperature": _COUNT,
    "sample.top_k": _COUNT,
}
"""The bounds of every number; `tests/config` checks that none is missing."""


@cache
def run_keys() -> Mapping[str, Key]:
    """The run file's sections and fields."""
    return _keys_of(RunConfig, "")


def leaves(keys: Mapping[str, Key] | None = None, path: str = "") -> Iterator[tuple[str, Key]]:
    """(dotted path, Key) of every field that is not a section."""
    for name, key in (run_keys() if keys is None else keys).items():
        inner = f"{path}.{name}" if path else name
        if key.keys is not None:
            yield from leaves(key.keys, inner)
        else:
            yield inner, key


def _keys_of(kind: type, path: str) -> Mapping[str, Key]:
    hints = get_type_hints(kind)
    return {
        field.name: _key(hints[field.name], f"{path}.{field.name}" if path else field.name)
        for field in fields(kind)
    }


def _key(hint: Any, path: str) -> Key:
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return Key("section", keys=_keys_of(hint, path))
    null = False
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
        null = True
    if get_origin(hint) is Literal:
        return Key("string", words=get_args(hint), null=null)
    return Key(_KINDS[hint], null=null, **RANGES.get(path, {}))
