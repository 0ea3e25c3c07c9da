"""DeepSpeed's engines on one device against the plain engine on the CPU: the tiny preset."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgpt.acceptance.check import Findings
from fgpt.config.resolve import Resolved, RunRequest, resolve
from fgpt.config.run_file import Override
from fgpt.data.loader import MicroBatch
from fgpt.distributed.launch import World
from fgpt.distributed.local_ranks import joined_ranks
from fgpt.engine.base import Engine
from fgpt.engine.build import build_engine

STEPS = 8
SEQ_LEN = 64
MICRO, ACCUMULATION = 4, 2
BOUNDS = {"fp32": (1e-4, 1e-3, 1e-3), "bf16": (2e-3, 3e-2, 4e-2), "fp16": (2e-3, 3e-2, 4e-2)}
"""Largest relative difference of a loss, of a gradient norm, and of a weight to its norm. A GPU's
sums have another order than the CPU's, so they are wider than those between engines on one CPU; a
wrong learning rate exceeds them (tests/acceptance)."""
PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}
JSON: Mapping[str, Any] = {
    "train_micro_batch_size_per_gpu": MICRO,
    "gradient_accumulation_steps": ACCUMULATION,
    "gradient_clipping": 1.0,
    "optimizer": {
        "type": "AdamW",
        "params": {
            "lr": 2e-3,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "torch_adam": True,
            "fused": True,
        },
    },
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": 3, "warmup_type": "linear"},
    },
}
CPU = torch.device("cpu")
MUP = {"model__mup_base": 64, "model__mup_base_d_head": 16}


@dataclass(frozen=True)
class Run:
    """What a short run saw."""

    losses: list[float]
    norms: list[float]
    skipped: list[bool]
    weights: dict[str, Tensor]
    """Full weights in float32 on the CPU after the last step."""


def resolved_run(json: Mapping[str, Any], device: str, **settings: Any) -> Resolved:
    """Resolve `JSON` with these sections, and run settings (`train__engine="plain"`)."""
    settings = {"data__seq_len": SEQ_LEN, "train__steps": STEPS, **settings}
    overrides = tuple(Override(k.replace("__", "."), v, "--set") for k, v in settings.items())
    config = {**copy.deepcopy(dict(JSON)), **copy.deepcopy(dict(json))}
    return resolve(RunRequest(Path("ds.json"), None, overrides, config), world=1, device=device)


def micro_batches(resolved: Resolved, step: int) -> list[MicroBatch]:
    """A step's samples: random ids with falling frequency, so that the loss can fall."""
    generator = torch.Generator().manual_seed(step)
    uniform = torch.rand(ACCUMULATION, MICRO, SEQ_LEN + 1, generator=generator)
    ids = (resolved.run.model.vocab_size * uniform**4).long()
    return [MicroBatch(part[:, :-1], part[:, 1:]) for part in ids]


def train(resolved: Resolved, device: torch.device, steps: int = STEPS) -> Run:
    """Build the engine and take these steps; the process group must exist."""
    engine = build_engine(resolved, World(), device)
    try:
        results = [
            engine.train_batch(micro_batches(resolved, engine.step)).result() for _ in range(steps)
        ]
        weights = {name: w.detach().float().cpu().clone() for name, w in engine.weights()}
    finally:
        close(engine)
    return Run(
        [r.loss for r in results],
        [r.grad_norm for r in results],
        [r.skipped for r in results],
        weights,
    )


def close(engine: Engine) -> None:
    """Release an engine's memory, so that the next one finds it free."""
    engine.close()
    del engine
    gc.collect()  # DeepSpeed's objects form cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def plain_run(json: Mapping[str, Any], **settings: Any) -> Run:
    """The reference: FGPT's plain engine on the CPU, none of the fast kernels."""
    slow = {"train__engine": "plain", "speed__loss": "plain", "speed__matmul": "torch"}
    return train(resolved_run(json, "cpu", **slow, **settings), CPU)


def compare(found: Findings, name: str, run: Run, wanted: Run, precision: str) -> None:
    """Record the largest differences, and fail those beyond `BOUNDS`."""
    loss, norm, weight = BOUNDS[precision]
    found.require(not any(run.skipped), f"{name}: steps were skipped: {run.skipped}")
    found.require(
        wanted.losses[-1] < wanted.losses[0] - 0.2, f"{name}: the reference's loss does not fall"
    )
    unit = "relative"
    found.figure(f"{name}: loss", _largest(run.losses, wanted.losses), unit, at_most=loss)
    found.figure(f"{name}: norm", _largest(run.norms, wanted.norms), unit, at_most=norm)
    # a key's bias has a true gradient of 0; Adam turns the noise in its place into whole steps
    differences = [
        (run.weights[key] - true).norm() / true.norm()
        for key, true in wanted.weights.items()
        if not key.endswith("qkv.bias")
    ]
    found.figure(f"{name}: weights", float(torch.stack(differences).max()), unit, at_most=weight)


def _largest(got: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest relative difference, NaN if there is one."""
    pairs = zip(got, wanted, strict=True)
    return float(torch.tensor([abs(a - b) / abs(b) for a, b in pairs]).max())


def check_fp32(found: Findings) -> None:
    """ZeRO 0 to 3."""
    _check_stages(found, "fp32")


def check_bf16(found: Findings) -> None:
    """ZeRO 0 to 3."""
    _check_stages(found, "bf16")


def check_fp16(found: Findings) -> None:
    """ZeRO 0 to 3, against fp32 on the CPU, which has no fp16."""
    _check_stages(found, "fp16")


def _check_stages(found: Findings, precision: str) -> None:
    wanted = plain_run({} if precision == "fp16" else PRECISIONS[precision])
    with joined_ranks(World(), found.device_kind) as device:
        for stage in range(4):
            json = {**PRECISIONS[precision], "zero_optimization": {"stage": stage}}
            resolved = resolved_run(json, device.type, speed__compile="off")
            compare(found, f"ZeRO-{stage}, {precision}", train(resolved, device), wanted, precision)


def check_fp8(found: Findings) -> None:
    """The blocks' projections in 8 bits train as in bf16, to a tenth of the loss's fall."""
    if found.on_gpu and torch.cuda.get_device_capability(found.device) < (8, 9):
        found.skip("fp8", "not run: needs compute capability 8.9 or more")
        return
    wanted = plain_run(PRECISIONS["bf16"])
    plain = {} if found.on_gpu else {"train__engine": "plain"}  # a CPU's engine is the plain one
    with joined_ranks(World(), found.device_kind) as device:
        json = {**PRECISIONS["bf16"], "zero_optimization": {"stage": 1}}
        resolved = resolved_run(
            json, device.type, speed__matmul="fp8", speed__compile="off", **plain
        )
        run = train(resolved, device)
    fall = wanted.losses[0] - wanted.losses[-1]
    pairs = zip(run.losses, wanted.losses, strict=True)
    difference = float(torch.tensor([abs(a - b) for a, b in pairs]).max())
    found.figure("loss, fp8 and bf16", difference, "nats", at_most=0.1 * fall)
    found.require(run.losses != wanted.losses, "fp8 changed nothing: was it used?")


def check_optimizers(found: Findings) -> None:
    """Learning rates by parameter group (muP), and Muon, with ZeRO-1 and ZeRO-3."""
    muon = {
        "optimizer": {
            "type": "Muon",
            "params": {"lr": 3e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"},
        }
    }
    cases: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("muP", {}, MUP),
        ("Muon", muon, {}),
        ("Muon, muP", muon, MUP),
    )
    with joined_ranks(World(), found.device_kind) as device:
        for name, json, settings in cases:
            wanted = plain_run(json, **settings)
            for stage in (1, 3):
                zero = {**json, "zero_optimization": {"stage": stage}}
                resolved = resolved_run(zero, device.type, speed__compile="off", **settings)
                compare(found, f"{name}, ZeRO-{stage}", train(resolved, device), wanted, "fp32")


def check_deepspeed_adams(found: Findings) -> None:
    """DeepSpeed's own Adams, which it compiles at their first use, with muP's learning rates."""
    wanted = plain_run({}, **MUP)
    own = {"type": "AdamW", "params": {"lr": 2e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    cases = {"DeepSpeedCPUAdam": {"optimizer": own, "zero_optimization": offload}}
    if found.on_gpu:
        cases["FusedAdam"] = {"optimizer": own, "zero_optimization": {"stage": 1}}
    else:
        found.skip("FusedAdam")
    with joined_ranks(World(), found.device_kind) as device:
        for name, json in cases.items():
            resolved = resolved_run(json, device.type, speed__compile="off", **MUP)
            compare(found, f"{name}, muP", train(resolved, device), wanted, "fp32")
