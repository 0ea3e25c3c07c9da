"""What nobody wrote: the None fields of a run file and the "auto" values of a DeepSpeed JSON."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.config.deepspeed.check import walk
from fgpt.config.load import set_field
from fgpt.config.schema import RunConfig
from fgpt.config.shapes import Shapes
from fgpt.utils.keys import AUTO


@dataclass(frozen=True)
class _Field:
    """How a run-file field that is None comes about."""

    path: str
    sources: tuple[str, ...]
    value: Callable[[RunConfig, Path], Any]
    how: str


_FIELDS = (
    _Field(
        "model.d_head",
        ("model.d_model", "model.n_head"),
        lambda run, _: Shapes.of(run.model).d_head,
        "d_model / n_head",
    ),
    _Field(
        "model.n_kv_head",
        ("model.n_head",),
        lambda run, _: Shapes.of(run.model).n_kv_head,
        "n_head",
    ),
    _Field(
        "model.d_ff",
        ("model.d_model", "model.activation"),
        lambda run, _: Shapes.of(run.model).d_ff,
        "4 d_model (SwiGLU: 8/3, rounded up to 64)",
    ),
    _Field(
        "data.seq_len",
        ("model.max_seq_len",),
        lambda run, _: run.model.max_seq_len,
        "model.max_seq_len",
    ),
    _Field(
        "run_dir",
        ("model.preset",),
        lambda run, ds_file: f"runs/{run.model.preset}-{ds_file.stem}",
        "runs/<preset>-<DeepSpeed JSON>",
    ),
)


@dataclass(frozen=True)
class Derived:
    """A RunConfig without None."""

    run: RunConfig
    origins: Mapping[str, str]
    """Of the derived fields only."""
    invalid: frozenset[str]
    """Derived fields whose sources are at issue."""


def derive_run(run: RunConfig, ds_file: Path, invalid: frozenset[str]) -> Derived:
    """Fill every None of `run`."""
    origins, suspect = {}, set()
    for field in _FIELDS:
        value: Any = run
        for name in field.path.split("."):
            value = getattr(value, name)
        if value is None:
            run = set_field(run, field.path, field.value(run, ds_file))
            origins[field.path] = f"derived: {field.how}"
            if any(s in invalid or s.partition(".")[0] in invalid for s in field.sources):
                suspect.add(field.path)
    return Derived(run, origins, frozenset(suspect))


@dataclass(frozen=True)
class Source:
    """What an "auto" is made from."""

    run: RunConfig
    device: str
    tree: Mapping[str, Any]
    """The JSON, in which the autos that stand earlier in AUTOS are resolved."""


def _total_steps(source: Source) -> int:
    total = source.tree["scheduler"]["params"].get("total_num_steps", source.run.train.steps)
    return int(total)


def _lr(source: Source) -> Any:
    return source.tree.get("optimizer", {}).get("params", {}).get("lr", 1e-3)


def _bf16(source: Source) -> bool:
    return source.device == "cuda" and not source.tree.get("fp16", {}).get("enabled")


_AutoValue = tuple[Callable[[Source], Any], str]
_D2 = "as accelerate does, from d_model"

AUTOS: Mapping[str, _AutoValue] = {
    "gradient_clipping": (lambda _: 1.0, "1.0"),
    "optimizer.params.lr": (lambda _: 1e-3, "0.001"),
    "optimizer.params.betas": (lambda _: [0.9, 0.95], "[0.9, 0.95]"),
    "optimizer.params.eps": (lambda _: 1e-8, "1e-8"),
    "optimizer.params.weight_decay": (lambda _: 0.1, "0.1"),
    "scheduler.params.total_num_steps": (lambda s: s.run.train.steps, "train.steps"),
    "scheduler.params.warmup_num_steps": (
        # Adam needs about 50 steps to settle; DeepSpeed silently turns 1 into 2.
        lambda s: max(2, min(_total_steps(s) // 2, max(50, min(2000, _total_steps(s) // 20)))),
        "total_num_steps / 20, within 50 and 2000, at most half of all steps",
    ),
    "scheduler.params.warmup_min_lr": (lambda _: 0.0, "0"),
    "scheduler.params.warmup_max_lr": (_lr, "optimizer.params.lr"),
    "fp16.enabled": (lambda _: False, "false"),
    "bf16.enabled": (_bf16, "true on cuda unless fp16 is on"),
    "zero_optimization.reduce_bucket_size": (lambda s: s.run.model.d_model**2, _D2),
    "zero_optimization.stage3_prefetch_bucket_size": (
        lambda s: int(0.9 * s.run.model.d_model**2),
        _D2,
    ),
    "zero_optimization.stage3_param_persistence_threshold": (
        lambda s: 10 * s.run.model.d_model,
        _D2,
    ),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (lambda _: False, "false"),
}
"""Dotted key -> (its value, how in words). The batch triple is `fgpt.config.batch`'s."""


def resolve_autos(
    tree: Mapping[str, Any], run: RunConfig, device: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """`tree` with every "auto" but the batch triple's replaced, and the origin of each.

    Whole numbers written as floats (5e8) become ints on the way.
    """
    resolved = copy.deepcopy(dict(tree))
    origins = {}
    for path, (value_of, how) in AUTOS.items():
        *sections, name = path.split(".")
        part: Any = resolved
        for section in sections:
            part = part.get(section) if isinstance(part, dict) else None
        if isinstance(part, dict) and part.get(name) == AUTO:
            part[name] = value_of(Source(run, device, resolved))
            origins[path] = f"derived: auto = {how}"
    for path, key, value in walk(resolved):
        if key.kind == "count" and isinstance(value, float):
            *sections, name = path.split(".")
            part = resolved
            for section in sections:
                part = part[section]
            part[name] = int(value)
    return resolved, origins
