"""Run file and flags -> RunConfig: default < preset < file < flag, with each value's origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from fgpt.config.data_path import blend_as_text
from fgpt.config.pipeline_partition import blocks_as_text
from fgpt.config.presets import PRESETS
from fgpt.config.request import Override
from fgpt.config.run_keys import leaves, run_keys
from fgpt.config.schema import RunConfig
from fgpt.errors import ConfigError, ConfigIssue
from fgpt.utils.keys import Key, nearest, shown
from fgpt.utils.strict_json import read_object


@dataclass(frozen=True)
class Loaded:
    """A RunConfig as far as it could be read. `run` is whole even when there are issues."""

    run: RunConfig
    origins: Mapping[str, str]
    """Dotted field -> default | preset NAME | file PATH | flag --x."""
    invalid: frozenset[str]
    """Dotted fields (or sections) whose written value was refused."""
    issues: tuple[ConfigIssue, ...]


@dataclass(frozen=True)
class _Written:
    """One value that somebody wrote."""

    value: Any
    origin: str
    where: str


def load(run_file: Path | None, overrides: Sequence[Override]) -> Loaded:
    """Read, check and merge. Never raises for what the user wrote: the issues are in the result."""
    issues: list[ConfigIssue] = []
    invalid: set[str] = set()
    written: dict[str, _Written] = {}
    if run_file is not None:
        try:
            tree = read_object(run_file)
        except ConfigError as error:
            issues += error.issues
            invalid |= set(run_keys())
        else:
            _flatten(tree, run_file, written, issues, invalid)
    for override in overrides:
        _add_override(override, written, issues, invalid)
    good = _well_formed(written, issues, invalid)
    if "model.preset" in invalid:
        invalid.add("model")
    preset = good["model.preset"].value if "model.preset" in good else None
    run = RunConfig() if preset is None else replace(RunConfig(), model=PRESETS[preset])
    origins = {path: "default" for path, _ in leaves()}
    if preset is not None:
        origins |= {path: f"preset {preset}" for path in origins if path.startswith("model.")}
    for path, item in good.items():
        run = set_field(run, path, item.value)
        origins[path] = item.origin
    return Loaded(run, origins, frozenset(invalid), tuple(issues))


def set_field(config: Any, path: str, value: Any) -> Any:
    """A copy of a (nested, frozen) dataclass with one dotted field replaced."""
    name, _, rest = path.partition(".")
    return replace(
        config, **{name: set_field(getattr(config, name), rest, value) if rest else value}
    )


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass tree as plain JSON objects."""
    return {
        f.name: to_dict(v) if is_dataclass(v := getattr(config, f.name)) else v
        for f in fields(config)
    }


def _flatten(
    tree: Mapping[str, Any],
    file: Path,
    written: dict[str, _Written],
    issues: list[ConfigIssue],
    invalid: set[str],
) -> None:
    for name, value in tree.items():
        key = run_keys().get(name)
        if name == "model" and isinstance(value, str):
            value = {"preset": value}
        if key is None or key.keys is None:
            written[name] = _Written(value, f"file {file}", f"{file}: {name}")
        elif isinstance(value, dict):
            for inner, leaf in value.items():
                path = f"{name}.{inner}"
                written[path] = _Written(leaf, f"file {file}", f"{file}: {path}")
        else:
            what, fix = f"{shown(value)} is wrong", f"must be {key.expected()}"
            issues.append(ConfigIssue(f"{file}: {name}", what, fix))
            invalid.add(name)


def _add_override(
    override: Override,
    written: dict[str, _Written],
    issues: list[ConfigIssue],
    invalid: set[str],
) -> None:
    key, value, flag = override
    where = f"{flag} {key}" if flag == "--set" else f"{flag} ({key})"
    section = run_keys().get(key)
    if section is None or section.keys is None:
        written[key] = _Written(value, f"flag {flag}", where)
        return
    if key == "model" and isinstance(value, str):
        value = {"preset": value}
    if not isinstance(value, dict):
        issues.append(
            ConfigIssue(where, f"{shown(value)} is wrong", f"write {flag} {key}.FIELD=VALUE")
        )
        invalid.add(key)
        return
    for inner, leaf in value.items():
        written[f"{key}.{inner}"] = _Written(leaf, f"flag {flag}", f"{where}.{inner}")


def _well_formed(
    written: Mapping[str, _Written], issues: list[ConfigIssue], invalid: set[str]
) -> dict[str, _Written]:
    """The values that fit their fields; a issue for each that does not."""
    known = dict(leaves())
    good = {}
    for path, item in written.items():
        if path not in known:
            issues.append(_unknown(path, item, known))
            # What the misspelled field was meant to be is not what the default says.
            if meant := nearest(path, set(known) - set(written)):
                invalid.add(meant)
            continue
        item = _as_text(path, item)
        complaint = known[path].complaint(item.value)
        if complaint:
            issues.append(ConfigIssue(item.where, f"{shown(item.value)} is wrong", complaint))
            invalid.add(path)
        else:
            good[path] = _as_declared(item, known[path])
    return good


_TEXTS: Mapping[str, Callable[[list[Any]], str | None]] = {
    "parallel.partition": blocks_as_text,
    "data.path": blend_as_text,
}
"""Fields that a run file may give as a list, and the list as a command line says it."""


def _as_text(path: str, item: _Written) -> _Written:
    if path not in _TEXTS or not isinstance(item.value, list):
        return item
    text = _TEXTS[path](item.value)
    return item if text is None else replace(item, value=text)


def _as_declared(item: _Written, key: Key) -> _Written:
    """1 for a float field becomes 1.0, so that equal runs have equal fingerprints."""
    if key.kind == "number" and item.value is not None:
        return replace(item, value=float(item.value))
    return item


def _unknown(path: str, item: _Written, known: Mapping[str, Key]) -> ConfigIssue:
    section, _, name = path.rpartition(".")
    if section and section not in run_keys():
        guess = nearest(section, run_keys())
        fix = f"did you mean section {guess!r}?" if guess else _sections()
        return ConfigIssue(item.where, f"unknown section {section!r}", fix)
    siblings = [p for p in known if p.rpartition(".")[0] == section]
    guess = nearest(path, siblings) if section else nearest(path, [*siblings, *run_keys()])
    homes = [p for p in known if p.rpartition(".")[2] == name]
    if homes:
        fix = f"{name!r} belongs in {' or '.join(home.rpartition('.')[0] for home in homes)}"
    elif guess:
        fix = f"did you mean {guess!r}?"
    else:
        fix = "known here: " + ", ".join(p.rpartition(".")[2] for p in siblings)
    if name in _SAID_IN_DS:
        fix = f"it belongs in the DeepSpeed JSON: {_SAID_IN_DS[name]}"
    return ConfigIssue(item.where, f"unknown key {name!r}", fix)


def _sections() -> str:
    return "the sections are " + ", ".join(run_keys())


_SAID_IN_DS: Mapping[str, str] = {
    "batch_size": "train_batch_size",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "learning_rate": "optimizer.params.lr",
    "lr": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "warmup_steps": "scheduler.params.warmup_num_steps",
    "precision": "bf16.enabled or fp16.enabled",
    "grad_clip": "gradient_clipping",
    "gradient_clipping": "gradient_clipping",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "zero_stage": "zero_optimization.stage",
}
