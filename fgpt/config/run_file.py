"""The run file and the flags: their fields as `Key`s, and reading them into a RunConfig.

A value comes from the default, the preset, the run file or a flag; a later one of these wins.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from fgpt.config.deepspeed.keys import SYNONYMS, TOP
from fgpt.config.field_syntax import (
    blend_text,
    blocks_text,
    expand_home,
    expand_stages,
    ramp_text,
    ranges_text,
    stages_text,
)
from fgpt.config.presets import PRESETS
from fgpt.config.schema import RunConfig
from fgpt.errors import ConfigError, ConfigIssue
from fgpt.utils.keys import Key, Kind, nearest, shown
from fgpt.utils.strict_json import read_object

_KINDS: Mapping[type, Kind] = {bool: "bool", int: "int", float: "number", str: "string"}

_POSITIVE: Mapping[str, Any] = {"low": 1}
_COUNT: Mapping[str, Any] = {"low": 0}
_ABOVE_ZERO: Mapping[str, Any] = {"low": 0, "open_low": True}
# torch.manual_seed accepts more; numpy's and the sampler's seeds are 64 bits
_SEED: Mapping[str, Any] = {"low": 0, "high": 2**63 - 1}

RANGES: Mapping[str, Mapping[str, Any]] = {
    "model.preset": {"words": tuple(PRESETS)},
    "model.vocab_size": _POSITIVE,
    "model.max_seq_len": {"low": 2},  # a token, and the one to predict
    "model.n_layer": _POSITIVE,
    "model.d_model": _POSITIVE,
    "model.n_head": _POSITIVE,
    "model.d_head": _POSITIVE,
    "model.n_kv_head": _POSITIVE,
    "model.d_ff": _POSITIVE,
    "model.rotary_base": _ABOVE_ZERO,
    "model.norm_eps": _ABOVE_ZERO,
    "model.logit_softcap": _ABOVE_ZERO,
    "model.z_loss": _COUNT,
    "model.dropout": {"low": 0, "high": 1, "open_high": True},
    "model.init_std": _ABOVE_ZERO,
    "model.embedding_scale": _ABOVE_ZERO,
    "model.window": _POSITIVE,
    "model.window_pattern": {"low": 2},  # 1 would be no window
    "model.mup_base": _POSITIVE,
    "model.mup_base_d_head": _POSITIVE,
    "data.seq_len": _POSITIVE,
    "data.seed": _SEED,
    "data.prefetch": _COUNT,
    "parallel.tp": _POSITIVE,
    "parallel.pp": _POSITIVE,
    "parallel.cp": _POSITIVE,
    "train.steps": _POSITIVE,
    "train.tokens": _ABOVE_ZERO,
    "train.epochs": _ABOVE_ZERO,
    "train.seed": _SEED,
    "train.log_every": _POSITIVE,
    "train.ema": {"low": 0, "high": 1, "open_low": True, "open_high": True},
    "train.max_skipped": _COUNT,
    "train.watchdog_s": _COUNT,
    "train.grace_s": _COUNT,
    "train.max_loss_jump": _COUNT,
    "schedule.warmup_steps": _COUNT,
    "schedule.decay_steps": _POSITIVE,
    "schedule.min_ratio": {"low": 0, "high": 1},
    "schedule.total_steps": _POSITIVE,
    "schedule.momentum_warmup_steps": _COUNT,
    "schedule.momentum_start": {"low": 0, "high": 1, "open_high": True},
    "eval.every": _COUNT,
    "eval.batches": _POSITIVE,
    "checkpoint.every": _COUNT,
    "checkpoint.keep": {"low": 2},
    "checkpoint.keep_every": _COUNT,
    "sample.every": _COUNT,
    "sample.tokens": _COUNT,
    "sample.temperature": _COUNT,
    "sample.top_k": _COUNT,
}
"""The range of every number; a test checks that none is missing."""


@cache
def run_keys() -> Mapping[str, Key]:
    """The run file's sections and fields, from the dataclasses' annotations and RANGES."""
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
    names = {_key_name(field.name): field.name for field in fields(kind)}
    return {
        name: _key(hints[attribute], f"{path}.{name}" if path else name)
        for name, attribute in names.items()
    }


def _key_name(attribute: str) -> str:
    """The key of a dataclass's field: `async_`, because async is a word of Python, is `async`."""
    return attribute.rstrip("_")


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


class Override(NamedTuple):
    """One value given on the command line."""

    key: str
    """Dotted run-file field, `train.steps`."""
    value: Any
    flag: str
    """The flag that set it, for reports: `--steps`."""


@dataclass
class LoadedRun:
    """The result of `load`: a complete RunConfig, even when there are issues."""

    run: RunConfig = field(default_factory=RunConfig)
    origins: dict[str, str] = field(default_factory=dict)
    """Dotted field -> default | preset NAME | file PATH | flag --x | weights PATH."""
    invalid: set[str] = field(default_factory=set)
    """Dotted fields and sections whose written values were refused; `run` has the defaults."""
    issues: list[ConfigIssue] = field(default_factory=list)


@dataclass(frozen=True)
class _WrittenValue:
    """One value of the run file or a flag."""

    value: Any
    origin: str
    where: str


def load(run_file: Path | None, overrides: Sequence[Override]) -> LoadedRun:
    """Read, check and merge the run file and the flags. Invalid values become `issues`."""
    loaded = LoadedRun()
    written: dict[str, _WrittenValue] = {}
    if run_file is not None:
        try:
            tree = read_object(run_file)
        except ConfigError as error:
            loaded.issues += error.issues
            loaded.invalid |= set(run_keys())
        else:
            _flatten_file(tree, run_file, written, loaded)
    for override in overrides:
        _add_override(override, written, loaded)
    valid = _check_values(written, loaded)
    if "model.preset" in loaded.invalid:
        loaded.invalid.add("model")
    loaded.origins |= dict.fromkeys((path for path, _ in leaves()), "default")
    if "model.preset" in valid:
        preset = valid["model.preset"].value
        loaded.run = replace(loaded.run, model=PRESETS[preset])
        for path in loaded.origins:
            if path.startswith("model."):
                loaded.origins[path] = f"preset {preset}"
    for path, item in valid.items():
        loaded.run = set_field(loaded.run, path, item.value)
        loaded.origins[path] = item.origin
    return loaded


def set_field(config: Any, path: str, value: Any) -> Any:
    """Return a copy of a (nested, frozen) dataclass with one dotted field replaced."""
    name, _, rest = path.partition(".")
    attribute = next(f.name for f in fields(config) if _key_name(f.name) == name)
    return replace(
        config, **{attribute: set_field(getattr(config, attribute), rest, value) if rest else value}
    )


def to_dict(config: Any) -> dict[str, Any]:
    """Return the nested dataclasses as JSON objects."""
    return {
        _key_name(f.name): to_dict(v) if is_dataclass(v := getattr(config, f.name)) else v
        for f in fields(config)
    }


def _flatten_file(
    tree: Mapping[str, Any], file: Path, written: dict[str, _WrittenValue], loaded: LoadedRun
) -> None:
    for name, value in tree.items():
        key = run_keys().get(name)
        if name == "model" and isinstance(value, str):
            value = {"preset": value}
        if key is None or key.keys is None:
            written[name] = _WrittenValue(value, f"file {file}", f"{file}: {name}")
        elif isinstance(value, dict):
            for inner, leaf in value.items():
                where = f"{file}: {name}.{inner}"
                for path, part in _written_fields(f"{name}.{inner}", leaf):
                    if path in written and written[path].value != part:
                        what = f"{shown(part)}, and {written[path].where} has another value"
                        issue = ConfigIssue(where, what, f"write {path} once")
                        loaded.issues.append(issue)
                    written[path] = _WrittenValue(part, f"file {file}", where)
        else:
            what, fix = f"{shown(value)} is wrong", f"must be {key.expected()}"
            loaded.issues.append(ConfigIssue(f"{file}: {name}", what, fix))
            loaded.invalid.add(name)


def _written_fields(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The field of a written value; of `model.mup: {"base": 128}` and `model.mup.base: 128` it is
    `model.mup_base`.
    """
    if path == "model.mup" and isinstance(value, dict):
        yield from ((f"model.mup_{name}", part) for name, part in value.items())
    elif path.startswith("model.mup."):
        yield path.replace("mup.", "mup_"), value
    else:
        yield path, value


def _add_override(override: Override, written: dict[str, _WrittenValue], loaded: LoadedRun) -> None:
    key, value, flag = override
    where = f"{flag} {key}" if flag == "--set" else f"{flag} ({key})"
    section = run_keys().get(key)
    if section is None or section.keys is None:
        for path, part in _written_fields(key, value):
            written[path] = _WrittenValue(part, f"flag {flag}", where)
        return
    if key == "model" and isinstance(value, str):
        value = {"preset": value}
    if not isinstance(value, dict):
        what, fix = f"{shown(value)} is wrong", f"write {flag} {key}.FIELD=VALUE"
        loaded.issues.append(ConfigIssue(where, what, fix))
        loaded.invalid.add(key)
        return
    for inner, leaf in value.items():
        for path, part in _written_fields(f"{key}.{inner}", leaf):
            written[path] = _WrittenValue(part, f"flag {flag}", f"{where}.{inner}")


_LIST_FIELDS: Mapping[str, Callable[[list[Any]], str | None]] = {
    "parallel.partition": blocks_text,
    "data.path": blend_text,
    "data.stages": stages_text,
    "data.skip_samples": ranges_text,
    "train.batch_ramp": ramp_text,
}
"""Fields that a run file may write as a list -> the same as a command line writes it."""


_PATH_FIELDS = ("run_dir", "data.path", "data.recipe", "train.init_from")


def _check_values(
    written: Mapping[str, _WrittenValue], loaded: LoadedRun
) -> dict[str, _WrittenValue]:
    """Return the values that fit their fields, in the fields' types."""
    known = dict(leaves())
    valid = {}
    for path, item in written.items():
        if path not in known:
            loaded.issues.append(_unknown(path, item, known))
            # a default must not stand in for the field that was meant
            if meant := nearest(path, set(known) - set(written)):
                loaded.invalid.add(meant)
            continue
        value = item.value
        if path in _LIST_FIELDS and isinstance(value, list):
            text = _LIST_FIELDS[path](value)
            value = value if text is None else text
        if path in _PATH_FIELDS and isinstance(value, str):
            value = expand_home(value)
            if path == "run_dir":  # runs/a/ is runs/a
                value = value.rstrip("/") or value
        if path == "data.stages" and isinstance(value, str):
            value = expand_stages(value)
        complaint = known[path].complaint(value)
        if complaint:
            what = f"{shown(value)} is wrong"
            loaded.issues.append(ConfigIssue(item.where, what, complaint))
            loaded.invalid.add(path)
            continue
        if known[path].kind == "number" and value is not None:
            value = float(value)  # equal runs have equal fingerprints
        valid[path] = replace(item, value=value)
    return valid


def _unknown(path: str, item: _WrittenValue, known: Mapping[str, Key]) -> ConfigIssue:
    section, _, name = path.rpartition(".")
    if section and section not in run_keys():
        if section.partition(".")[0] in TOP:
            fix = f"it belongs in the DeepSpeed JSON: --ds_set {path}=..."
            return ConfigIssue(item.where, f"unknown section {section!r}", fix)
        guess = nearest(section, run_keys())
        fix = f"did you mean section {guess!r}?" if guess else f"sections: {', '.join(run_keys())}"
        return ConfigIssue(item.where, f"unknown section {section!r}", fix)
    siblings = [p for p in known if p.rpartition(".")[0] == section]
    guess = nearest(path, siblings) if section else nearest(path, [*siblings, *run_keys()])
    sections = [p.rpartition(".")[0] for p in known if p.rpartition(".")[2] == name]
    if name in SYNONYMS or (not section and name in TOP):
        own = SYNONYMS.get(name, name)
        fix = f"it belongs in the DeepSpeed JSON: {own}"
        fix += f" (--ds_set {own}=...)" if item.origin.startswith("flag") else ""
    elif sections:
        fix = f"{name!r} belongs in {' or '.join(sections)}"
    elif guess:
        fix = f"did you mean {guess!r}?"
    else:
        names = siblings if section else run_keys()
        fix = "known here: " + ", ".join(p.rpartition(".")[2] for p in names)
    return ConfigIssue(item.where, f"unknown key {name!r}", fix)
