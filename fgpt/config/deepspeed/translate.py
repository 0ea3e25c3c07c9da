"""A user's DeepSpeed JSON in today's words, before its keys are checked.

Everything here is harmless: what is dropped has no effect in DeepSpeed either, what is renamed
keeps its value, and a wish for DeepSpeed's parallelism or compiler becomes a run-file field.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fgpt.config.deepspeed.keys import COMMENT_MARKS, COMMENTS
from fgpt.config.deepspeed.settings import CHECKPOINTING, Tree, keys_of, set_at, value_at, walk
from fgpt.errors import ConfigIssue, Edit, Grade
from fgpt.utils.keys import AUTO, did_you_mean, nearest, shown


@dataclass(frozen=True)
class Wish:
    """A value of the JSON that the run file states in FGPT."""

    key: str
    """The DeepSpeed key, dotted."""
    run_field: str
    """The run-file field, dotted."""
    value: Any
    written: Any
    """The JSON's value."""


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
        if name.startswith(COMMENT_MARKS) or name in COMMENTS:
            yield inner
        elif isinstance(value, dict):
            yield from _comments(value, inner)


def _drop_nulls(result: Translated) -> None:
    """A section that is null is absent."""
    for path, key, value in list(walk(result.tree)):
        if value is None and key.kind == "section" and key.is_checked and not key.null:
            set_at(result.tree, path, None)


def _rename(result: Translated) -> None:
    """DeepSpeed itself takes these names for today's."""
    for path, key, value in list(walk(result.tree)):
        if not key.renamed:
            continue
        present = value_at(result.tree, key.renamed)
        section, _, name = key.renamed.rpartition(".")
        present_key = (keys_of(section, result.tree) or {}).get(name, key)
        unread = present_key.unread
        removal = Edit(f"deepspeed.{path}")
        grade: Grade = "warning"
        edits: tuple[Edit, ...] = (removal,)
        if unread:
            fix = f"dropped: {unread}"
        elif "offload" in path:
            fix, grade, edits = _offload_switch(value, present, key.renamed, removal)
        elif present is not None:
            fix = f"dropped: {key.renamed}, its present name, is written too"
        else:
            fix = f"read as {key.renamed}, its present name"
            edits = (removal, Edit(f"deepspeed.{key.renamed}", value))
        result.report(path, shown(value), fix, grade, *edits)


def _offload_switch(
    value: Any, present: Any, renamed: str, removal: Edit
) -> tuple[str, Grade, tuple[Edit, ...]]:
    """What becomes of cpu_offload and cpu_offload_param, which were switches."""
    is_on = _as_switch(value)
    offload = Edit(f"deepspeed.{renamed}", {"device": "cpu"})
    if is_on is None:
        return f"must be true or false; its present name is {renamed}", "error", (removal,)
    if not is_on:
        return "dropped: it asks for nothing", "warning", (removal,)
    if present is None:
        return f"read as {renamed}, its present name", "warning", (removal, offload)
    if isinstance(present, dict) and present.get("device") in ("cpu", "nvme"):
        return f"dropped: {renamed} is written too", "warning", (removal,)
    return f"contradicts {renamed}: keep one of the two", "error", (removal,)


def _as_switch(value: Any) -> bool | None:
    """What a switch means, also as DeepSpeed's pydantic reads numbers and words; None: nothing."""
    if value is None or value in (False, "false", "False", "off", "no"):  # 0 == False
        return False
    return True if value in (True, "true", "True", "on", "yes") else None


def _take_wishes(result: Translated) -> None:
    """Move the wishes out of the JSON; `fgpt.config.resolve` reports them."""
    for section, known in _WISH_SECTIONS.items():
        written = result.tree.get(section)
        if not isinstance(written, dict):
            continue
        for name in list(written):
            guess = nearest(name, known)
            if name not in known and guess:
                path = f"{section}.{name}"
                fix = f"did you mean {guess!r}?"
                result.report(path, shown(written[name]), fix, "error", Edit(f"deepspeed.{path}"))
    for key, run_field in _SIZES.items():
        size = value_at(result.tree, key)
        if size is None or size == AUTO:
            continue
        if type(size) is not int or size < 0:
            what, edit = shown(size), Edit(f"deepspeed.{key}")
            result.report(key, what, "must be a whole number >= 0", "error", edit)
        elif size > 1 or key == "seed":
            result.wishes.append(Wish(key, run_field, size, size))
            _take(result.tree, key)
    written = result.tree.get("compile")
    switch = written
    if isinstance(written, dict):
        switch = written.get("enabled", written.get("deepcompile") or None)
    is_on = None if switch is None else _as_switch(switch)
    if is_on is not None:
        value = "blocks" if is_on else "off"
        result.wishes.append(Wish("compile", "speed.compile", value, written))
        _take(result.tree, "compile")


def _take(tree: dict[str, Any], key: str) -> None:
    """Remove a key, and the sections that are empty then."""
    while key:
        set_at(tree, key, None)
        key = key.rpartition(".")[0]
        if value_at(tree, key) != {}:
            return


_SIZES = {
    "tensor_parallel.autotp_size": "parallel.tp",
    "tensor_parallel.tp_size": "parallel.tp",
    "tensor_parallel.tp.tp_size": "parallel.tp",
    "sequence_parallel_size": "parallel.cp",
    "pipeline.stages": "parallel.pp",
    "seed": "train.seed",
}
"""Numbers that DeepSpeed reads elsewhere or not at all -> the run-file field."""


_WISH_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "tensor_parallel": ("autotp_size", "tp_size", "tp", "enabled", "preset_model", "tp_grain_size"),
    "pipeline": (
        "stages",
        "partition",
        "seed_layers",
        "activation_checkpoint_interval",
        "pipe_partitioned",
        "grad_partitioned",
    ),
    "compile": ("enabled", "deepcompile", "backend", "kwargs"),
}
"""Sections with wishes -> keys that are not misspellings."""


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
    is_on = _as_switch(section.get("enabled", True))
    asks = [n for n, value in section.items() if n not in known or not _is_off(value)]

    def asks_for_it(name: str) -> bool:
        # a likely misspelling does, until it is reported; a stray key does not
        return name in _RECOMPUTES or (name not in known and nearest(name, known) is not None)

    if is_on is False or not any(map(asks_for_it, asks)):
        if "enabled" not in section or is_on is False:
            what, fix = "its switches are off", "no activation is recomputed"
            result.report(CHECKPOINTING, what, fix, "note", Edit(f"deepspeed.{CHECKPOINTING}"))
            return
    # absent switches are off, and a section whose last switch is dropped stays an empty one
    result.tree[CHECKPOINTING] = {n: section[n] for n in asks if n != "enabled"}


def _is_off(value: Any) -> bool:
    return value is None or value is False
