"""From a scenario to what a rank is told, and what keeps a scenario from being measured here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fgpt.bench.scenarios import Scenario
from fgpt.bench.workloads import Subject
from fgpt.config.batch import ACCUMULATION, MICRO
from fgpt.config.resolve import Resolved, RunRequest, resolve
from fgpt.config.rules.run import has_compiler
from fgpt.config.run_file import Override
from fgpt.model import cpu_features
from fgpt.model.cpu_features import prefers_onednn
from fgpt.utils.strict_json import read_object

CONFIGS = Path(__file__).parents[2] / "ds_configs/bench"


@dataclass(frozen=True)
class Job:
    """A scenario as every rank of it knows it; it travels as JSON."""

    model: str
    json: str
    precision: str
    micro_batch: int
    accumulation: int
    seq_len: int
    sets: dict[str, Any]
    subject: Subject
    ranks: int

    def resolved(self, device: str) -> Resolved:
        """Resolve as for training. Raises ConfigError."""
        file = CONFIGS / f"{self.json}.json"
        config = read_object(file)
        config |= {MICRO: self.micro_batch, ACCUMULATION: self.accumulation}
        config["bf16"] = {"enabled": self.precision == "bf16"}
        values = {"model.preset": self.model, "data.seq_len": self.seq_len, **self.sets}
        overrides = tuple(Override(name, value, "--set") for name, value in values.items())
        request = RunRequest(file, None, overrides, config)
        return resolve(request, world=self.ranks, device=device)


def job_of(scenario: Scenario, device: str) -> Job:
    """What the ranks of a scenario are told on this device."""
    row, rung = scenario.row, scenario.rung
    precision = rung.precision
    if precision == "fastest":
        precision = "bf16" if multiplies_bf16(device) else "fp32"
    return Job(
        model=row.name,
        json=rung.json,
        precision=precision,
        micro_batch=rung.micro_batch or row.micro_batch,
        accumulation=rung.accumulation,
        seq_len=row.seq_len,
        sets=dict(rung.sets),
        subject=rung.subject,
        ranks=rung.ranks,
    )


def obstacle(scenario: Scenario, device: str, n_gpus: int) -> str | None:
    """Why a scenario cannot be measured here; None if it can. `n_gpus`: on all nodes together."""
    rung = scenario.rung
    if rung.device is not None and rung.device != device:
        return "no GPU" if rung.device == "cuda" else "only on a CPU"
    if rung.slow_mkl and not prefers_onednn():
        return "torch's own are as fast on this processor"
    if device == "cpu" and rung.sets.get("speed.compile") == "blocks" and not has_compiler():
        return "no C++ compiler"
    if rung.precision == "bf16" and not multiplies_bf16(device):
        return "this processor does not multiply bf16 itself"
    if device == "cuda" and rung.ranks > n_gpus:
        return f"{rung.ranks} ranks, {n_gpus} GPU(s)"
    if rung.subject.startswith("transformers") and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    return None


def multiplies_bf16(device: str) -> bool:
    """Whether bf16 is fast there: on a GPU since Ampere, a CPU with AVX-512 BF16 or AMX."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return cpu_features.multiplies_bf16()
