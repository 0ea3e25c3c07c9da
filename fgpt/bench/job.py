"""A scenario as a job for its ranks, and the reasons why it cannot be measured on this machine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fgpt.bench.scenarios import Scenario, Target
from fgpt.config.batch import ACCUMULATION, MICRO
from fgpt.config.resolve import Resolved, RunRequest, resolve
from fgpt.config.run_file import Override
from fgpt.model import cpu_features
from fgpt.model.cpu_features import prefers_onednn
from fgpt.utils.compiler import missing_compiler
from fgpt.utils.strict_json import read_object

CONFIGS = Path(__file__).parents[2] / "ds_configs/bench"


@dataclass(frozen=True)
class Job:
    """Everything that a rank needs to run a scenario; sent to it as JSON."""

    model: str
    ds_config: str
    precision: str
    micro_batch: int
    accumulation: int
    seq_len: int
    overrides: dict[str, Any]
    target: Target
    ranks: int

    def resolved(self, device: str) -> Resolved:
        """Resolve as for training. Raises ConfigError."""
        file = CONFIGS / f"{self.ds_config}.json"
        config = read_object(file)
        config |= {MICRO: self.micro_batch, ACCUMULATION: self.accumulation}
        config["bf16"] = {"enabled": self.precision == "bf16"}
        values = {"model.preset": self.model, "data.seq_len": self.seq_len, **self.overrides}
        overrides = tuple(Override(name, value, "--set") for name, value in values.items())
        request = RunRequest(file, None, overrides, config)
        return resolve(request, world=self.ranks, device=device)


def job_of(scenario: Scenario, device: str) -> Job:
    """Return the job of a scenario on this device."""
    workload, variant = scenario.workload, scenario.variant
    precision = variant.precision
    if precision == "fastest":
        precision = "bf16" if multiplies_bf16(device) else "fp32"
    return Job(
        model=workload.name,
        ds_config=variant.ds_config,
        precision=precision,
        micro_batch=variant.micro_batch or workload.micro_batch,
        accumulation=variant.accumulation,
        seq_len=workload.seq_len,
        overrides=dict(variant.overrides),
        target=variant.target,
        ranks=variant.ranks,
    )


def skip_reason(scenario: Scenario, device: str, n_gpus: int) -> str | None:
    """Return why a scenario cannot be measured here, or None. `n_gpus`: on all nodes together."""
    variant = scenario.variant
    if variant.device is not None and variant.device != device:
        return "no GPU" if variant.device == "cuda" else "only on a CPU"
    if variant.slow_mkl and not prefers_onednn():
        return "torch's matrix products are as fast on this processor"
    if device == "cpu" and variant.overrides.get("speed.compile") == "blocks":
        if (missing := missing_compiler("cpu")) is not None:
            return missing
    if variant.precision == "bf16" and not multiplies_bf16(device):
        return "this processor has no native bf16"
    if device == "cuda" and variant.ranks > n_gpus:
        return f"{variant.ranks} ranks, {n_gpus} GPU(s)"
    if (
        variant.target.startswith("transformers")
        and importlib.util.find_spec("transformers") is None
    ):
        return "transformers is not installed"
    return None


def multiplies_bf16(device: str) -> bool:
    """True if bf16 is native: GPUs since Ampere, CPUs with AVX-512 BF16 or AMX."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return cpu_features.multiplies_bf16()
