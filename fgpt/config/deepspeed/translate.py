"""A user's DeepSpeed JSON in today's words, before its keys are checked.

Everything here is harmless: what is dropped has no effect in DeepSpeed either, what is renamed
keeps its value, and a wish for DeepSpeed's parallelism or compiler becomes a run-file field.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fgpt.config.deepspeed.keys import COMMENTS
from fgpt.config.deepspeed.settings import CHECKPOINTING, Tree, keys_of, set_at, value_at, walk
from fgpt.errors import ConfigIssue, Edit, Grade
from fgpt.utils.keys import AUTO, did_you_mean, shown


@dataclass(frozen=True)
class Wish:
    """A value of the JSON that the run file states in FGPT."""

    key: str
    """The DeepSpeed key, dotted."""
    run_field: str
    """The run-file field, dotted."""
    value: Any


@dataclass
class Translated:
    """The result of `translate`."""

    tree: dict[str, Any]
    file: str
    issues: list[ConfigIssue] = field(default_factory=list)
    """Warnings and notes."""
    wishes: list[Wish] = field(default_factory=list)

    def report(self, path: str, what: str, fix: str, grade: Grade, *edits: Edit) -> None:
        """Record a finding and apply its edits."""
        where = f"{self.file}: {path}" if path else self.file
        self.issues.append(ConfigIssue(where, what, fix, grade, edits))
        for edit in edits:
            set_at(self.tree, edit.path.removeprefix("deepspeed."), edit.value)


def translate(tree: Tree, file: str) -> Translated:
    """Translate a JSON as read; never fails, whatever the types of its values."""
    result = Translated(copy.deepcopy(dict(tree)), file)
    _drop_comments(result)
    _drop_nulls(result)
    _rename(result)
    _take_wishes(result)
    _drop_autos(result)
    _replace_warmup_type(result)
    _settle_checkpointing(result)
    return result


def _drop_comments(result: Translated) -> None:
    """JSON has no comments, so users write them as keys."""
    for path in list(_comments(result.tree, "")):
        what = shown(value_at(result.tree, path))
        result.report(path, what, "dropped: it is a comment", "warning", Edit(f"deepspeed.{path}"))


def _comments(section: Mapping[str, Any], path: str) -> Iterator[str]:
    for name, value in section.items():
        inner = f"{path}.{name}" if path else name
        if "." in name:
            continue  # not a name that a dotted path can reach
        if name.startswith("_") or name in COMMENTS:
            yield inner
        elif isinstance(value, dict):
            yield from _comments(value, inner)


def _drop_nulls(result: Translated) -> None:
    """A section that is null is absent."""
    for path, key, value in list(walk(result.tree)):
        if value is None and key.kind == "section" and key.is_checked and not key.null:
            set_at(result.tree, path, None)


_CONVERSIONS: Mapping[str, Callable[[Any], Any]] = {
    "zero_optimization.cpu_offload": lambda value: {"device": "cpu"} if value is True else None,
    "zero_optimization.cpu_offload_param": lambda value: (
        {"device": "cpu"} if value is True else None
    ),
}
"""Old names whose values have another form today."""


def _rename(result: Translated) -> None:
    """DeepSpeed itself takes these names for today's."""
    for path, key, value in list(walk(result.tree)):
        if not key.renamed:
            continue
        new = _CONVERSIONS.get(path, lambda value: value)(value)
        edits = [Edit(f"deepspeed.{path}")]
        fix = f"read as {key.renamed}, its present name"
        if new is None:
            fix = "dropped: it asks for nothing"
        elif value_at(result.tree, key.renamed) is not None:
            fix = f"dropped: {key.renamed}, its present name, is written too"
        else:
            edits.append(Edit(f"deepspeed.{key.renamed}", new))
        result.report(path, shown(value), fix, "warning", *edits)


_SIZES = {
    "tensor_parallel.autotp_size": "parallel.tp",
    "tensor_parallel.tp_size": "parallel.tp",
    "sequence_parallel_size": "parallel.cp",
    "pipeline.stages": "parallel.pp",
}


def _take_wishes(result: Translated) -> None:
    """Move the wishes out of the JSON; `fgpt.config.resolve` reports them."""
    for wish in list(_wishes(result.tree)):
        result.wishes.append(wish)
        section = wish.key.partition(".")[0]
        set_at(result.tree, wish.key, None)
        if result.tree.get(section) == {}:
            del result.tree[section]


def _wishes(tree: Tree) -> Iterator[Wish]:
    """What the JSON asks of DeepSpeed, and the run file states in FGPT."""
    for key, run_field in _SIZES.items():
        size = value_at(tree, key)
        if type(size) is int and size > 1:
            yield Wish(key, run_field, size)
    switch = value_at(tree, "compile")
    if isinstance(switch, dict):
        switch = switch.get("enabled", switch.get("deepcompile") or None)
    if isinstance(switch, bool):
        yield Wish("compile", "speed.compile", "blocks" if switch else "off")
    seed = tree.get("seed")
    if type(seed) is int and seed >= 0:
        yield Wish("seed", "train.seed", seed)


_TAKES_AUTO_AS_ABSENT = ("zero_optimization", "fp16", "bf16", "tensorboard", "wandb", "csv_monitor")
"""Sections in which DeepSpeed drops every "auto"."""


def _drop_autos(result: Translated) -> None:
    for path, key, value in list(walk(result.tree)):
        if value != AUTO or key.auto or not key.is_checked:
            continue
        if path.partition(".")[0] in _TAKES_AUTO_AS_ABSENT and "." in path:
            fix = f"DeepSpeed's default: {shown(key.default)}"
            result.report(path, '"auto"', fix, "note", Edit(f"deepspeed.{path}"))


def _replace_warmup_type(result: Translated) -> None:
    """DeepSpeed warns about a warm-up that it does not know, and takes "log"."""
    path = "scheduler.params.warmup_type"
    value, words = value_at(result.tree, path), ("log", "linear")
    if isinstance(value, str) and value not in words and not did_you_mean(value, words):
        edit = Edit(f"deepspeed.{path}", "log")
        result.report(path, shown(value), 'DeepSpeed takes "log" for it', "warning", edit)


_RECOMPUTES = (
    "partition_activations",
    "cpu_checkpointing",
    "contiguous_memory_optimization",
    "number_checkpoints",
)


def _settle_checkpointing(result: Translated) -> None:
    """Leave the section only where it asks for recomputation.

    An empty one does; one that only says false and null, as many JSONs carry along, does not.
    """
    section = value_at(result.tree, CHECKPOINTING)
    if not isinstance(section, dict) or not section:
        return
    known = keys_of(CHECKPOINTING, result.tree) or {}
    asks = [n for n, value in section.items() if n not in known or not _is_off(value)]
    if not any(name in _RECOMPUTES or name not in known for name in asks):
        what, fix = "its switches are off", "no activation is recomputed"
        result.report(CHECKPOINTING, what, fix, "note", Edit(f"deepspeed.{CHECKPOINTING}"))
        return
    # absent switches are off, and a section whose last switch is dropped stays an empty one
    result.tree[CHECKPOINTING] = {name: section[name] for name in asks}


def _is_off(value: Any) -> bool:
    return value is None or value is False
