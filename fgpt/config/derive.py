"""Derived values: the None fields of a run file, and what a DeepSpeed JSON leaves open."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from fgpt.config.batch import GLOBAL, MICRO
from fgpt.config.deepspeed.settings import (
    DeepSpeedSettings,
    InvalidValueError,
    set_at,
    value_at,
    walk,
)
from fgpt.config.run_file import set_field
from fgpt.config.schema import RunConfig, Shapes
from fgpt.optim.optimizers import peak_rate
from fgpt.optim.schedules import REQUIRED_PARAMS
from fgpt.utils.keys import AUTO


@dataclass(frozen=True)
class _DerivedField:
    """How a run-file field that is None is derived."""

    path: str
    sources: tuple[str, ...]
    """The fields that it depends on."""
    value: Callable[[RunConfig, Path], Any]
    formula: str
    """The same, for the origin in reports."""


def warmup_steps(total: int) -> int:
    """The steps of an automatic warm-up: Adam needs about 50 to settle."""
    return min(total // 2, max(50, min(2000, total // 20)))


def _total_steps(run: RunConfig) -> int:
    return run.schedule.total_steps or run.train.steps


def _decay_steps(run: RunConfig) -> int:
    """Steps of the decay; 0 where a written warm-up is too long, which a rule reports."""
    total, kind = _total_steps(run), run.schedule.kind
    after_warmup = max(0, total - (run.schedule.warmup_steps or 0))
    shares = {"wsd": min(after_warmup, -(-total // 5)), "constant": 0}
    return shares.get(kind, after_warmup)


_DERIVED_FIELDS = (
    _DerivedField(
        "model.d_head",
        ("model.d_model", "model.n_head"),
        lambda run, _: Shapes.of(run.model).d_head,
        "d_model / n_head",
    ),
    _DerivedField(
        "model.n_kv_head",
        ("model.n_head",),
        lambda run, _: Shapes.of(run.model).n_kv_head,
        "n_head",
    ),
    _DerivedField(
        "model.d_ff",
        ("model.d_model", "model.activation"),
        lambda run, _: Shapes.of(run.model).d_ff,
        "4 d_model (SwiGLU: 8/3, rounded up to 64)",
    ),
    _DerivedField(
        "data.seq_len",
        ("model.max_seq_len",),
        lambda run, _: run.model.max_seq_len,
        "model.max_seq_len",
    ),
    _DerivedField(
        "schedule.total_steps",
        ("schedule.kind", "train.steps"),
        lambda run, _: run.train.steps,
        "train.steps",
    ),
    _DerivedField(
        "schedule.warmup_steps",
        ("schedule.kind", "schedule.total_steps", "train.steps"),
        lambda run, _: warmup_steps(_total_steps(run)),
        "total_steps / 20, within 50 and 2000, at most half of them",
    ),
    _DerivedField(
        "schedule.decay_steps",
        ("schedule.kind", "schedule.total_steps", "schedule.warmup_steps", "train.steps"),
        lambda run, _: _decay_steps(run),
        "total_steps / 5 (cosine, linear: all after the warm-up; constant: 0)",
    ),
    _DerivedField(
        "schedule.decay_shape",
        ("schedule.kind",),
        lambda run, _: {"wsd": "1-sqrt", "constant": None}.get(
            run.schedule.kind, run.schedule.kind
        ),
        "1-sqrt (cosine, linear: kind)",
    ),
    _DerivedField(
        "schedule.min_ratio",
        ("schedule.kind",),
        lambda run, _: None if run.schedule.kind == "constant" else 0.0,
        "0",
    ),
    _DerivedField(
        "schedule.momentum_start",
        ("schedule.kind", "schedule.momentum_warmup_steps"),
        lambda run, _: 0.85 if run.schedule.momentum_warmup_steps else None,
        "0.85",
    ),
    _DerivedField(
        "run_dir",
        ("model.preset",),
        lambda run, ds_file: f"runs/{run.model.preset}-{ds_file.stem}",
        "runs/<preset>-<DeepSpeed JSON>",
    ),
)


@dataclass(frozen=True)
class DerivedRun:
    """A RunConfig without the None of derived fields."""

    run: RunConfig
    origins: Mapping[str, str]
    """Of the derived fields only."""
    invalid: frozenset[str]
    """Derived fields with an invalid source."""


def derive_run(run: RunConfig, ds_file: Path, invalid: set[str]) -> DerivedRun:
    """Replace every None of `run` that has a default.

    `invalid`: fields and sections whose values were refused.
    """
    origins, suspect = {}, set()
    for field in _DERIVED_FIELDS:
        value: Any = run
        for name in field.path.split("."):
            value = getattr(value, name)
        is_idle = field.path.startswith("schedule.") and run.schedule.kind == "deepspeed"
        if value is None and not is_idle:
            run = set_field(run, field.path, field.value(run, ds_file))
            origins[field.path] = f"derived: {field.formula}"
            if any(s in invalid or s.partition(".")[0] in invalid for s in field.sources):
                suspect.add(field.path)
    return DerivedRun(run, origins, frozenset(suspect))


def monitor_paths(settings: DeepSpeedSettings, run_dir: str) -> Iterator[tuple[str, str]]:
    """(key, value) of each path that the JSON leaves out: DeepSpeed's default is one directory for
    all runs, below the directory in which the run was started.
    """
    for name in settings.monitors:
        if name == "wandb":
            continue
        output, job = (settings.written(f"{name}.{key}") for key in ("output_path", "job_name"))
        if not output:
            yield f"{name}.output_path", f"{run_dir}/{name}" if job else run_dir
        if not job:
            yield f"{name}.job_name", PurePath(run_dir).name if output else name


Dialect = Literal["fgpt", "hf"]
"""Whose values "auto" and absence stand for: FGPT's, or those of Hugging Face's Trainer."""


@dataclass(frozen=True)
class Filled:
    """The result of `fill_in`."""

    tree: dict[str, Any]
    notes: Mapping[str, tuple[str, str]]
    """Dotted key that was filled in -> (what was missing, what became of it)."""


DEFAULT_MICRO_BATCH = 8
_AUTO_PARAMS = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), AUTO)
_SCHEDULES: Mapping[Dialect, Mapping[str, Any]] = {
    "fgpt": {
        "type": "WarmupCosineLR",
        "params": {
            "total_num_steps": AUTO,
            "warmup_num_steps": AUTO,
            "warmup_min_ratio": 0.01,
            "cos_min_ratio": 0.1,
            "warmup_type": "linear",
        },
    },
    "hf": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": AUTO,
            "warmup_num_steps": AUTO,
            "warmup_min_lr": AUTO,
            "warmup_max_lr": AUTO,
            "warmup_type": "linear",
        },
    },
}


def fill_in(
    tree: Mapping[str, Any],
    invalid: Collection[str] = (),
    dialect: Dialect = "fgpt",
    *,
    has_schedule: bool = False,
) -> Filled:
    """Write what a training run needs and the JSON leaves out; never replaces a written value.

    `invalid`: keys and sections that `tree` lacks because their values were refused. A JSON that
    states its learning rate keeps DeepSpeed's meaning of an absent scheduler, a constant rate.
    Where FGPT chooses the rate, it chooses the schedule too. `has_schedule`: the run file does.
    """
    filled, notes = copy.deepcopy(dict(tree)), {}

    def is_absent(path: str) -> bool:
        parts = path.split(".")
        prefixes = {".".join(parts[:n]) for n in range(len(parts) + 1)}
        return value_at(filled, path) is None and not prefixes & set(invalid)

    # 1. batch sizes
    sizes = [AUTO if is_absent(name) else value_at(filled, name) for name in (GLOBAL, MICRO)]
    if sizes == [AUTO, AUTO]:
        filled[MICRO] = DEFAULT_MICRO_BATCH
        notes[MICRO] = "no batch size is written", f"{DEFAULT_MICRO_BATCH}; --micro_batch sets it"
    # 2. optimizer
    if is_absent("optimizer.type"):
        if "optimizer" not in filled:
            filled["optimizer"] = {"params": dict(_AUTO_PARAMS)}
        filled["optimizer"]["type"] = "AdamW"
        notes["optimizer"] = "no optimizer is written", "AdamW; --lr sets its learning rate"
    # 3. schedule
    chooses_lr = value_at(filled, "optimizer.params.lr") == AUTO
    total = "scheduler.params.total_num_steps"
    if has_schedule:
        pass
    elif is_absent("scheduler") and chooses_lr:
        filled["scheduler"] = copy.deepcopy(dict(_SCHEDULES[dialect]))
        notes["scheduler"] = "no scheduler is written", str(filled["scheduler"]["type"])
    elif is_absent("scheduler"):
        notes["scheduler"] = "no scheduler is written", "the learning rate is constant"
    elif value_at(filled, "scheduler.type") in _NEED_TOTAL and is_absent(total):
        set_at(filled, total, AUTO)
        notes[total] = "is not written", "train.steps"
    # 4. the implementation of Adam
    if is_absent("optimizer.params.torch_adam") and _takes_torch_adam(filled, invalid):
        for name, value in _AS_DEEPSPEEDS_ADAM.items():
            if is_absent(f"optimizer.params.{name}"):
                set_at(filled, f"optimizer.params.{name}", value)
        notes["optimizer.params.torch_adam"] = (
            "is not written",
            "true: torch's fused Adam computes the same as DeepSpeed's and compiles nothing",
        )
    return Filled(filled, notes)


_AS_DEEPSPEEDS_ADAM: Mapping[str, Any] = {"torch_adam": True, "fused": True, "weight_decay": 0.0}
"""What makes torch's Adam DeepSpeed's; torch's own default decays AdamW's weights by 0.01."""
_NEED_TOTAL = [kind for kind, names in REQUIRED_PARAMS.items() if "total_num_steps" in names]


def _takes_torch_adam(tree: Mapping[str, Any], invalid: Collection[str]) -> bool:
    settings = DeepSpeedSettings(tree, frozenset(invalid))
    try:
        optimizer = settings.optimizer
        return optimizer is not None and optimizer.is_adam and settings.implementation == "torch"
    except InvalidValueError:
        return False


@dataclass(frozen=True)
class AutoInputs:
    """What the value of an "auto" depends on."""

    run: RunConfig
    device: str
    settings: DeepSpeedSettings
    """The JSON, in which the earlier keys of AUTOS are resolved."""


def _warmup_steps(inputs: AutoInputs) -> int:
    total = inputs.settings.written("scheduler.params.total_num_steps") or inputs.run.train.steps
    return max(2, warmup_steps(int(total)))  # DeepSpeed silently changes 1 to 2


def _peak_lr(inputs: AutoInputs) -> Any:
    return peak_rate(inputs.settings.optimizer_params)


def _bf16(inputs: AutoInputs) -> bool:
    return inputs.device == "cuda" and not inputs.settings.get("fp16.enabled")


_AutoValue = tuple[Callable[[AutoInputs], Any], str]
_AS_ACCELERATE = "as accelerate does, from d_model"

AUTOS: Mapping[str, _AutoValue] = {
    "gradient_clipping": (lambda _: 1.0, "1.0"),
    "optimizer.params.lr": (lambda _: 1e-3, "0.001"),
    "optimizer.params.betas": (lambda _: [0.9, 0.95], "[0.9, 0.95]"),
    "optimizer.params.eps": (lambda _: 1e-8, "1e-8"),
    "optimizer.params.weight_decay": (lambda _: 0.1, "0.1"),
    "scheduler.params.total_num_steps": (lambda s: s.run.train.steps, "train.steps"),
    "scheduler.params.warmup_num_steps": (
        _warmup_steps,
        "total_num_steps / 20, within 50 and 2000, at most half of all steps",
    ),
    "scheduler.params.warmup_min_lr": (lambda _: 0.0, "0"),
    "scheduler.params.warmup_max_lr": (_peak_lr, "optimizer.params.lr"),
    "fp16.enabled": (lambda _: False, "false"),
    "bf16.enabled": (_bf16, "true on cuda unless fp16 is on"),
    "zero_optimization.reduce_bucket_size": (lambda s: s.run.model.d_model**2, _AS_ACCELERATE),
    "zero_optimization.stage3_prefetch_bucket_size": (
        lambda s: int(0.9 * s.run.model.d_model**2),
        _AS_ACCELERATE,
    ),
    "zero_optimization.stage3_param_persistence_threshold": (
        lambda s: 10 * s.run.model.d_model,
        _AS_ACCELERATE,
    ),
}
"""Dotted key -> (function of its value, formula). `fgpt.config.batch` solves the batch triple."""

_HF_AUTOS: Mapping[str, _AutoValue] = {
    "optimizer.params.lr": (lambda _: 5e-5, "5e-5, as Hugging Face's Trainer"),
    "optimizer.params.betas": (lambda _: [0.9, 0.999], "[0.9, 0.999]"),
    "optimizer.params.weight_decay": (lambda _: 0.0, "0"),
    "scheduler.params.warmup_num_steps": (lambda _: 2, "0, which DeepSpeed changes to 2"),
}
"""What differs where "auto" means what Hugging Face's Trainer writes for it."""


def resolve_autos(
    tree: Mapping[str, Any], run: RunConfig, device: str, dialect: Dialect = "fgpt"
) -> tuple[dict[str, Any], dict[str, str]]:
    """Replace every "auto" but those of the batch triple; also return the origin of each.

    Integers written as floats (5e8) become ints.
    """
    resolved = copy.deepcopy(dict(tree))
    origins = {}
    autos = {**AUTOS, **_HF_AUTOS} if dialect == "hf" else AUTOS
    for path, (derive, formula) in autos.items():
        if value_at(resolved, path) == AUTO:
            inputs = AutoInputs(run, device, DeepSpeedSettings(resolved))
            set_at(resolved, path, derive(inputs))
            origins[path] = f"derived: auto = {formula}"
    for path, key, value in list(walk(resolved)):
        if key.kind == "count" and isinstance(value, float):
            set_at(resolved, path, int(value))
    return resolved, origins
