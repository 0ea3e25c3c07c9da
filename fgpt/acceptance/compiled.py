"""Compiled blocks and CUDA graphs against the same blocks without a compiler."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fgpt.acceptance.check import Findings
from fgpt.config.presets import PRESETS
from fgpt.config.schema import ModelConfig
from fgpt.engine.base import DTYPES
from fgpt.engine.speed import prefer_fast_attention
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize

STEPS = 3
"""CUDA graphs are recorded in the second and replayed from the third on."""


def check_compiled(found: Findings) -> None:
    """Losses and gradients of steps on different samples; with rotary positions and GQA, too."""
    prefer_fast_attention(found.device)
    config = replace(PRESETS["tiny"], n_layer=2)
    llama = replace(config, position="rotary", n_kv_head=2, norm="rmsnorm", activation="swiglu")
    modes: tuple[tuple[str, str | None], ...] = (
        ("compiled", None),
        ("CUDA graphs", "reduce-overhead"),
    )
    cases = {"GPT-2's block": config}
    if found.on_gpu:  # a CPU's compiler takes half a minute for each
        cases["Llama's block"] = llama
    for precision in ("fp32", "bf16"):
        if precision == "bf16" and not found.on_gpu:
            found.skip("bf16")  # the same code for a CPU's compiler
            continue
        for name, model in cases.items():
            for mode_name, mode in modes:
                part = f"{mode_name}, {name}, {precision}"
                if mode is not None and not found.on_gpu:
                    found.skip(part)
                else:
                    _compare(found, part, model, precision, mode)


def _compare(
    found: Findings, part: str, config: ModelConfig, precision: str, mode: str | None
) -> None:
    """The compiled model's distance from float32 is at most 1.5 times the eager one's."""
    torch.compiler.reset()
    dtype = DTYPES[precision]
    exact, eager, compiled = (
        _model(config, kind, found.device) for kind in (torch.float32, dtype, dtype)
    )
    compiled.compile_blocks(mode)
    for step in range(STEPS):
        truth, slow, fast = (_outcome(model, step) for model in (exact, eager, compiled))
        difference, own = _distance(fast, truth), _distance(slow, truth)
        bound = max(1.5 * own, 1e-5)
        found.figure(f"{part}, step {step}", difference, "relative to fp32", at_most=bound)


def _model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    model = GPT(config)
    initialize(model, config, seed=1)
    return model.to(device=device, dtype=dtype)


def _outcome(model: GPT, step: int) -> list[Tensor]:
    """Loss and gradients of a step."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(model.config.vocab_size, (2, 257), generator=generator)
    ids = ids.to(next(model.parameters()).device)
    model.zero_grad()
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    gradients = [p.grad.float().clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach().float().clone(), *gradients]


def _distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """Of all tensors together, relative to their norm."""
    pairs = list(zip(found, exact, strict=True))
    squares = torch.stack([(a - b).double().square().sum() for a, b in pairs]).sum()
    return float(
        (squares / torch.stack([b.double().square().sum() for _, b in pairs]).sum()).sqrt()
    )
