"""What a resume may not change, and what it may."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fgpt.checkpoint.manifest import Manifest
from fgpt.config.deepspeed.settings import DeepSpeedSettings
from fgpt.config.resolve import Resolved
from fgpt.config.schema import ModelConfig
from fgpt.errors import CheckpointError
from fgpt.model.count import n_params
from fgpt.optim.optimizers import OPTIMIZERS

# fields that do not change what the model computes
_FREE_MODEL_FIELDS = ("preset", "attention")
# values of runs whose checkpoints do not record these fields
_DEFAULTS = {"data.packing": "stream", "data.document_mask": False, "data.reset_positions": False}


_TORCH_ADAM = "optimizer.params.torch_adam"
"""Whether torch's Adam has the states, or DeepSpeed's, which are laid out differently."""
_STAGE = "ZeRO stage"
_STATES = "optimizer states (amsgrad and momentum add one)"


def run_identity(resolved: Resolved, data_fingerprint: str) -> dict[str, Any]:
    """Return everything that a resume may not change, by dotted name."""
    run, batch = resolved.run, resolved.batch
    identity: dict[str, Any] = {
        f"model.{name}": value
        for name, value in dataclasses.asdict(run.model).items()
        if name not in _FREE_MODEL_FIELDS
    }
    identity |= {
        "data (fingerprint of the data card)": data_fingerprint,
        "data.seq_len": run.data.seq_len,
        "data.seed": run.data.seed,
        **{name: getattr(run.data, name.removeprefix("data.")) for name in _DEFAULTS},
        "train.seed": run.train.seed,
        "train.engine": run.train.engine,
        "global batch (samples)": batch.global_size,
        "number of ranks": batch.world,
        "tensor-parallel ranks (tp)": batch.tp,
        "pipeline stages (pp)": batch.pp,
        "context-parallel ranks (cp)": batch.cp,
        "parallel.partition": run.parallel.partition.replace(" ", ""),
        "precision": resolved.precision,
        _STAGE: resolved.zero_stage,
        "optimizer": resolved.deepspeed["optimizer"]["type"],
        _STATES: _states(
            resolved.deepspeed["optimizer"]["type"], resolved.settings.optimizer_params
        ),
        _TORCH_ADAM: run.train.engine == "plain" or resolved.settings.implementation == "torch",
    }
    identity |= _partition_layout(resolved.settings, n_params(run.model))
    if resolved.precision == "fp16":  # the checkpoint contains the loss scaler
        identity |= {f"fp16.{key}": value for key, value in resolved.deepspeed["fp16"].items()}
    return identity


def saved_identity(manifest: Manifest) -> dict[str, Any]:
    """Return a checkpoint's identity, with what older ones only have in their configuration."""
    config = manifest.config.get("deepspeed", {})
    section = config.get("optimizer", {})
    params = section.get("params", {})
    is_own = bool(config) and params.get("torch_adam") is not True
    is_own = is_own and manifest.identity.get("optimizer") in ("Adam", "AdamW")
    is_own = is_own and manifest.identity.get("train.engine") != "plain"
    states = _states(str(section.get("type")), params) if config else None
    model = manifest.config.get("run", {}).get("model")
    layout = {}
    if config and model:
        layout = _partition_layout(DeepSpeedSettings(config), n_params(ModelConfig(**model)))
    return {_TORCH_ADAM: not is_own, _STATES: states, **layout, **manifest.identity}


def _partition_layout(settings: DeepSpeedSettings, n_elements: int) -> dict[str, Any]:
    """Return the keys that decide which elements of a ZeRO partition belong to which parameter.

    DeepSpeed loads a partition without looking: with another order, wrong weights.
    """
    if settings.zero_stage in (1, 2):
        key = "zero_optimization.round_robin_gradients"
        return {key: bool(settings.get(key))}
    if settings.zero_stage == 3:
        key = "zero_optimization.sub_group_size"
        return {key: min(int(settings.get(key)), n_elements)}  # a larger one makes one group, too
    return {}


def _states(name: str, params: Mapping[str, Any]) -> list[str] | None:
    """The state tensors of the optimizer; None if it is unknown."""
    optimizer = OPTIMIZERS.get(name.lower())
    return list(optimizer.state_names(params)) if optimizer else None


def check_identity(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Raise CheckpointError naming every difference, with both values."""
    saved, current = {**_DEFAULTS, **saved}, {**_DEFAULTS, **current}
    if saved.get(_STAGE) != current.get(_STAGE):  # what depends on the stage says nothing then
        saved, current = (
            {n: v for n, v in values.items() if not n.startswith("zero_optimization.")}
            for values in (saved, current)
        )
    differences = [
        f"{name}: checkpoint {saved.get(name)!r}, this run {current.get(name)!r}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{where} belongs to another run: "
            + "; ".join(differences)
            + "; change them back, or start afresh with --resume none"
        )


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
