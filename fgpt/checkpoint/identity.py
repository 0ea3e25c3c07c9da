"""What two runs must share for one to continue the other, and what may change in between."""

from __future__ import annotations

import dataclasses
from typing import Any

from fgpt.config.resolve import Resolved
from fgpt.errors import CheckpointError

# how the model computes, not what it is
_FREE_MODEL_FIELDS = ("preset", "attention")
# what runs were like whose checkpoints do not say it
_UNSAID = {"data.packing": "stream", "data.document_mask": False, "data.reset_positions": False}


def run_identity(resolved: Resolved, data_fingerprint: str) -> dict[str, Any]:
    """Flat dictionary of everything that a resume may not change, by its dotted name."""
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
        **{name: getattr(run.data, name.removeprefix("data.")) for name in _UNSAID},
        "train.seed": run.train.seed,
        "train.engine": run.train.engine,
        "global batch (samples)": batch.global_size,
        "number of ranks": batch.world,
        "tensor-parallel ranks (tp)": batch.tp,
        "pipeline stages (pp)": batch.pp,
        "context-parallel ranks (cp)": batch.cp,
        "parallel.partition": run.parallel.partition.replace(" ", ""),
        "precision": resolved.precision,
        "ZeRO stage": resolved.zero_stage,
        "optimizer": resolved.deepspeed["optimizer"]["type"],
    }
    if resolved.precision == "fp16":  # the loss scaler is part of a checkpoint
        identity |= {f"fp16.{key}": value for key, value in resolved.deepspeed["fp16"].items()}
    return identity


def check_identity(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Raise CheckpointError naming every value that differs, with both."""
    saved, current = {**_UNSAID, **saved}, {**_UNSAID, **current}
    differences = [
        f"{name}: {saved.get(name)!r} there, {current.get(name)!r} here"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{where} belongs to another run: "
            + "; ".join(differences)
            + "; set them back, or start afresh with --resume none"
        )


def changed_settings(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """What else was changed since the checkpoint (learning rate, steps, ...): allowed, but said."""
    changes: list[str] = []
    for name in sorted(saved.keys() | current.keys()):
        old, new = saved.get(name), current.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_settings(old, new, f"{prefix}{name}.")
        elif old != new:
            changes.append(f"{prefix}{name}: {old!r} -> {new!r}")
    return changes
