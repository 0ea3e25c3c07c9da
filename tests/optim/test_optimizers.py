"""Compares the table of optimizers with torch's state tensors and DeepSpeed's choices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fgpt.config.deepspeed.settings import DeepSpeedSettings
from fgpt.optim.optimizers import OPTIMIZERS

CLASSES = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("AdamW", {}),
        ("Adam", {"amsgrad": True}),
        ("SGD", {}),
        ("SGD", {"momentum": 0.9}),
        ("Adagrad", {}),
    ],
)
def test_states_are_torchs(name: str, params: dict[str, Any]) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = CLASSES[name]([weight], lr=0.1, **params)
    weight.grad = torch.ones(3)
    optimizer.step()
    tensors = {key for key, value in optimizer.state[weight].items() if value is not None}
    assert tensors - {"step"} == set(OPTIMIZERS[name.lower()].state_names(params))


@pytest.mark.parametrize(
    ("name", "params", "offload", "implementation"),
    [
        ("AdamW", {"torch_adam": True}, "cpu", "torch"),
        ("AdamW", {}, "cpu", "torch"),
        ("AdamW", {"torch_adam": False}, "cpu", "cpu"),
        ("Adam", {"torch_adam": False}, "none", "fused"),
        ("Adam", {"bias_correction": False}, "none", "fused"),
        ("SGD", {}, "cpu", "torch"),
        ("Adagrad", {}, "cpu", "cpu"),
        ("Adagrad", {}, "none", "torch"),
        ("Lion", {}, "cpu", "cpu"),
    ],
)
def test_implementation(
    name: str, params: dict[str, Any], offload: str, implementation: str
) -> None:
    settings = DeepSpeedSettings(
        {
            "optimizer": {"type": name, "params": params},
            "zero_optimization": {"offload_optimizer": {"device": offload}},
        }
    )
    assert settings.implementation == implementation
    assert settings.uses_cpu_adam == (implementation == "cpu" and "Adam" in name)
