"""What a resume may not change, what --allow lets it change, and what it may always change.

The layout (ranks, tp, pp, cp, ZeRO stage, offload, precision, engine) is free: see
`fgpt.engine.state`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fgpt.checkpoint.manifest import Manifest
from fgpt.config.batch import BatchRamp
from fgpt.config.field_syntax import parse_ranges, ranges_text
from fgpt.config.resolve import Resolved
from fgpt.config.schema import ModelConfig
from fgpt.errors import CheckpointError
from fgpt.optim.optimizers import OPTIMIZERS

# fields that do not change what the model computes
_FREE_MODEL_FIELDS = ("preset", "attention")
DATA = "data (fingerprint of the data card)"
"""Name of the data's fingerprint in an identity."""
STAGES = "data.stages"
"""Name of the later stages: [first sample, fingerprint] of each; absent without any."""
SKIPPED = "data.skip_samples"
"""Name of the samples that are left out: [first, last] of each range; absent without any."""
_BATCH = "global batch (samples)"
_DATA_FIELDS = ("packing", "document_mask", "reset_positions")
ALLOWABLE = {
    "data": (DATA, STAGES, SKIPPED, *(f"data.{name}" for name in _DATA_FIELDS)),
    "batch": (_BATCH,),
    "seq_len": ("data.seq_len",),
    "seed": ("data.seed", "train.seed"),
    "model": (),
}
"""Value of --allow -> the names in an identity that may then differ; model: all fields of the model
that keep the shapes of its parameters."""
_NEW_SAMPLES = (*(set(ALLOWABLE["data"]) - {SKIPPED}), "data.seq_len", "data.seed")
"""With another of these, a sample number means other tokens: reading begins at sample 0."""


_MODEL_DEFAULTS = {f"model.{f.name}": f.default for f in dataclasses.fields(ModelConfig)}


def value_in(identity: Mapping[str, Any], name: str) -> Any:
    """Return the value of a name; of a field of the model that is younger than the identity, its
    default, which computes what was computed without it.
    """
    return identity.get(name, _MODEL_DEFAULTS.get(name))


def run_identity(
    resolved: Resolved, data_fingerprint: str, stages: Sequence[Any] = ()
) -> dict[str, Any]:
    """Return everything that a resume may not change without --allow, by dotted name.

    `stages`: of the data (`BlendedDataset.stage_identity`); see `identity_until`.
    """
    run = resolved.run
    skipped = run.data.skip_samples
    return {
        **{
            f"model.{name}": value
            for name, value in dataclasses.asdict(run.model).items()
            if name not in _FREE_MODEL_FIELDS
        },
        DATA: data_fingerprint,
        **({STAGES: list(stages)} if stages else {}),
        **({SKIPPED: list(map(list, parse_ranges(skipped)))} if skipped else {}),
        **{f"data.{name}": getattr(run.data, name) for name in _DATA_FIELDS},
        "data.seq_len": run.data.seq_len,
        "data.seed": run.data.seed,
        "train.seed": run.train.seed,
        _BATCH: _batch_identity(resolved.ramp),
    }


def identity_until(identity: Mapping[str, Any], samples_seen: int) -> dict[str, Any]:
    """Return an identity without the stages and the skipped samples from `samples_seen` on.

    They have not changed what was read: a resume may add, change and drop them.
    """
    stages = [stage for stage in identity.get(STAGES, ()) if stage[0] < samples_seen]
    skipped = [
        [first, min(last, samples_seen - 1)]
        for first, last in identity.get(SKIPPED, ())
        if first < samples_seen
    ]
    rest = {name: value for name, value in identity.items() if name not in (STAGES, SKIPPED)}
    return rest | ({STAGES: stages} if stages else {}) | ({SKIPPED: skipped} if skipped else {})


def change_of_later_samples(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """`name: old -> new` of the samples that are left out, for a run's history; None: the same."""
    old, new = (identity.get(SKIPPED) for identity in (saved, current))
    return None if old == new else f"{SKIPPED}: {old!r} -> {new!r}"


def _batch_identity(ramp: BatchRamp) -> int | str:
    """The global batch, or train.batch_ramp in one spelling."""
    if len(ramp.parts) == 1:
        return ramp.parts[0][1]
    return ",".join(f"{step}:{size}" for step, size in ramp.parts)


def run_layout(resolved: Resolved) -> dict[str, Any]:
    """Return how the run is spread out, for the history in its checkpoints."""
    batch, run = resolved.batch, resolved.run
    is_plain = run.train.engine == "plain"
    return {
        "ranks": batch.world,
        "tp": batch.tp,
        "pp": batch.pp,
        "cp": batch.cp,
        "ZeRO": None if is_plain else resolved.zero_stage,
        "precision": resolved.precision,
        "engine": run.train.engine,
    }


def check_identity(
    saved: dict[str, Any], current: dict[str, Any], where: str, allow: Collection[str] = ()
) -> tuple[str, ...]:
    """Compare a checkpoint's identity with this run's; return the differences that `allow` permits.

    Raises CheckpointError naming every other difference, with both values and its --allow.
    """
    names = sorted(saved.keys() | current.keys())
    differing = [n for n in names if value_in(saved, n) != value_in(current, n)]
    kinds = {name: _kind(name) for name in differing}
    refused = [name for name in differing if kinds[name] not in allow]
    if refused:
        flags = ",".join(sorted({kinds[name] for name in refused} | set(allow)))
        keep = " ".join(
            _flag_of(name, value_in(saved, name), value_in(current, name)) for name in refused
        )
        raise CheckpointError(
            f"{where}: this run differs: {_both_values(refused, saved, current)}; go on as"
            f" before with {keep}, let it differ with --allow {flags}, or start afresh with"
            " --resume none"
        )
    return tuple(
        f"{name}: {value_in(saved, name)!r} -> {value_in(current, name)!r}" for name in differing
    )


def _flag_of(name: str, value: Any, now: Any) -> str:
    """The flags of launchers/train.py that give a name of an identity this value instead."""
    if name == DATA:
        return "the --data of before"
    if name == STAGES:
        return "--set data.stages=null" if value is None else "the data.stages of before"
    if name == SKIPPED:
        return f"--set {SKIPPED}={'null' if value is None else ranges_text(value)}"
    text = value if isinstance(value, str) else json.dumps(value)
    batch = f"--global_batch {text}"
    if isinstance(value, str):
        batch = f"--set train.batch_ramp={text} --global_batch {text.rpartition(':')[2]}"
    elif isinstance(now, str):
        batch = f"--set train.batch_ramp=null {batch}"
    return {
        _BATCH: batch,
        "train.seed": f"--seed {text}",
    }.get(name, f"--set {name}={text}")


def _kind(name: str) -> str:
    """The value of --allow that lets this name differ."""
    return next((kind for kind, names in ALLOWABLE.items() if name in names), "model")


def _both_values(names: Iterable[str], saved: dict[str, Any], current: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: checkpoint {value_in(saved, name)!r}, this run {value_in(current, name)!r}"
        for name in names
    )


def check_shapes(
    saved: Manifest, shapes: Mapping[str, Sequence[int]], identity: dict[str, Any], where: str
) -> None:
    """Raise CheckpointError unless a checkpoint has the parameters of this model.

    `identity`: this run's, to name the settings that differ.
    """
    current = {name: tuple(shape) for name, shape in shapes.items()}
    for name in sorted(saved.tensors.keys() | current.keys()):
        old = list(saved.tensors[name].shape) if name in saved.tensors else "none"
        new = list(current[name]) if name in current else "none"
        if old != new:
            settings = [
                n
                for n in identity
                if n.startswith("model.") and value_in(saved.identity, n) != identity[n]
            ]
            why = _both_values(settings, saved.identity, identity)
            again = ""
            if saved.origin:
                again = " (repeat the run's --init_from, which gave it)"
            raise CheckpointError(
                f"{where} has another model: {why + '; ' if why else ''}{name}: checkpoint {old},"
                f" this run {new}; choose that model{again}, or start afresh with --resume none"
            )


def begins_anew(changes: Sequence[str]) -> bool:
    """Whether reading begins at sample 0 after these changes of `check_identity`."""
    return any(change.startswith(f"{name}: ") for change in changes for name in _NEW_SAMPLES)


def kept_states(saved_type: str, saved_states: Sequence[str], resolved: Resolved) -> list[str]:
    """Return the optimizer states of a checkpoint that this run's optimizer goes on with."""
    current = str(resolved.deepspeed["optimizer"]["type"])
    old, new = OPTIMIZERS.get(saved_type.lower()), OPTIMIZERS[current.lower()]
    # Adam and AdamW differ in their weight decay, not in their states
    is_same = old is not None and (
        old.name == new.name
        or (old.is_adam and new.is_adam)
        or (old.package == new.package != "" and old.states == new.states)
    )
    names = new.state_names(resolved.settings.optimizer_params)
    return [name for name in saved_states if is_same and name in names]


def changed_settings(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the differences of two configurations, one line each: `name: old -> new`."""
    changes: list[str] = []
    for name in sorted(saved.keys() | current.keys()):
        old, new = saved.get(name), current.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_settings(old, new, f"{prefix}{name}.")
        elif old != new:
            changes.append(f"{prefix}{name}: {old!r} -> {new!r}")
    return changes
