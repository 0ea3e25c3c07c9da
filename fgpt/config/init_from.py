"""`train.init_from`: the model of the weights becomes the run's, where the user set nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from fgpt.config.run_file import LoadedRun, set_field
from fgpt.config.schema import ModelConfig, SavedModel, Shapes
from fgpt.errors import ConfigIssue, Edit
from fgpt.utils.keys import shown

_SHAPE_FIELDS = (
    "n_layer",
    "d_model",
    "n_head",
    "d_head",
    "n_kv_head",
    "d_ff",
    "norm_place",
    "qk_norm",
    "tied_head",
    "bias",
    "mup_base",
    "mup_base_d_head",
)
"""Fields that give parameters another shape or their rows another meaning."""
_FREE_FIELDS = (
    "preset",
    "attention",
    "dropout",
    "init_std",
    "init_residual",
    "z_loss",
    "vocab_size",
)
"""Fields that do not change what the weights compute, and one that is compared apart."""


def adopt_model(loaded: LoadedRun, saved: SavedModel) -> Iterator[ConfigIssue]:
    """Take the model's fields, and the data, from the saved model; yields what contradicts it, and
    notes.
    """
    source, path, data = saved
    if loaded.origins["data.path"] == "default" and "data.path" not in loaded.invalid:
        if data is None:
            what = f"not set, and the weights of {path} have their own tokenizer"
            fix = (
                "name data that it has tokenized with --data DIR (fgpt prepare --input TEXTS"
                f" --tokenizer {path} --out DIR)"
            )
            yield ConfigIssue("train.init_from: data.path", what, fix)
        else:
            loaded.run = set_field(loaded.run, "data.path", data)
            loaded.origins["data.path"] = f"weights {path}"
    for field in fields(ModelConfig):
        name = f"model.{field.name}"
        if loaded.origins[name] == "default" and name not in loaded.invalid:
            loaded.run = set_field(loaded.run, name, getattr(source, field.name))
            loaded.origins[name] = f"weights {path}"
    if any(name.startswith("model") for name in loaded.invalid):
        return
    mine, theirs = _values(loaded.run.model), _values(source)
    refused = _refused(loaded.run.model, source)
    for name, value in mine.items():
        if value == theirs[name] or name in _FREE_FIELDS:
            continue
        where = f"model.{name} ({loaded.origins[f'model.{name}']})"
        what = f"{shown(value)}, the weights of {path} have {shown(theirs[name])}"
        if name in refused:
            fix = refused[name] or "leave it out, or start without these weights"
            edits = (Edit(f"run.model.{name}"),)
            yield ConfigIssue(f"train.init_from: {where}", what, fix, edits=edits)
        else:
            fix = "the weights are used as they are"
            yield ConfigIssue(f"train.init_from: {where}", what, fix, "note")
    yield from _vocabulary_issues(loaded, saved)


def _values(model: ModelConfig) -> dict[str, object]:
    return vars(model) | {
        name: value for name, value in vars(Shapes.of(model)).items() if name in vars(model)
    }


def _refused(mine: ModelConfig, theirs: ModelConfig) -> dict[str, str]:
    """The fields in which the two may not differ, with the remedy where there is a better one."""
    refused = dict.fromkeys(_SHAPE_FIELDS, "")
    if "learned" in (mine.position, theirs.position):
        refused["position"] = ""
        refused["max_seq_len"] = (
            "learned positions cannot be resized: leave it out; for shorter samples set"
            f" data.seq_len (at most {theirs.max_seq_len})"
        )
    if theirs.bias:  # RMSNorm has none
        refused["norm"] = ""
    if "swiglu" in (mine.activation, theirs.activation):
        refused["activation"] = ""
    return refused


def _vocabulary_issues(loaded: LoadedRun, saved: SavedModel) -> Iterator[ConfigIssue]:
    mine, rows, path = loaded.run.model.vocab_size, saved.config.vocab_size, saved.path
    where = f"train.init_from: model.vocab_size ({loaded.origins['model.vocab_size']})"
    what = f"{mine}, the weights of {path} have {rows} rows"
    if mine < rows:
        fix = f"set model.vocab_size >= {rows}, or leave it out"
        yield ConfigIssue(where, what, fix, edits=(Edit("run.model.vocab_size"),))
    elif mine > rows:
        yield ConfigIssue(where, what, f"{mine - rows} new rows get initial values", "note")
