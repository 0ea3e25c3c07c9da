"""The DeepSpeed JSON and the run file of a planned run, ready to launch."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from fgpt.config.presets import PRESETS
from fgpt.config.resolve import Resolved, RunRequest, resolve
from fgpt.config.run_file import Override
from fgpt.config.schema import ModelConfig
from fgpt.plan.planned_run import PlannedRun

LEARNING_RATES = ((1e9, 3e-4), (1e10, 2e-4), (1e11, 1.2e-4), (float("inf"), 6e-5))
"""Parameters below this -> peak rate of AdamW, by Brown et al. 2020, table 2.1."""


def deepspeed_json(run: PlannedRun, n_params: int) -> dict[str, Any]:
    """Return the DeepSpeed JSON of a run; `n_params` chooses the learning rate."""
    rate = next(rate for limit, rate in LEARNING_RATES if n_params < limit)
    zero: dict[str, Any] = {"stage": run.zero_stage, "reduce_bucket_size": run.bucket_elements}
    if run.offloads_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if run.offloads_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    value: dict[str, Any] = {
        "train_batch_size": run.global_batch,
        "train_micro_batch_size_per_gpu": run.micro,
        "gradient_accumulation_steps": run.accumulation,
        "gradient_clipping": 1.0,
        "fp16" if run.precision == "fp16" else "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": rate, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"},
        },
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if run.recompute != "none":
        value["activation_checkpointing"] = {}
    return value


def run_file(run: PlannedRun) -> dict[str, Any]:
    """Return the run file of a run."""
    value: dict[str, Any] = {
        "model": _model_fields(run.model),
        "data": {"seq_len": run.seq_len},
        "parallel": {"tp": run.tp, "pp": run.pp, "cp": run.cp, "sequence": run.sequence},
    }
    if run.recompute != "none":
        value["speed"] = {"recompute": "cheap" if run.recompute == "cheap" else "all"}
    return value


def _model_fields(model: ModelConfig) -> dict[str, Any]:
    """The preset, and the fields in which the model differs from it."""
    preset = PRESETS.get(model.preset)
    if preset is None:
        preset = ModelConfig()
    names = [field.name for field in fields(model) if field.name != "preset"]
    changed = {
        name: getattr(model, name)
        for name in names
        if getattr(model, name) != getattr(preset, name)
    }
    return {"preset": preset.preset, **changed}


def resolved_of(deepspeed: dict[str, Any], run: PlannedRun, name: str, folder: Path) -> Resolved:
    """Return the complete configuration of the two files. Raises ConfigError if FGPT refuses it."""
    overrides = tuple(
        Override(f"{section}.{key}", value, "--fit")
        for section, values in run_file(run).items()
        for key, value in values.items()
    )
    request = RunRequest(folder / name, None, overrides, deepspeed=deepspeed)
    return resolve(request, world=run.ranks, device="cuda")
