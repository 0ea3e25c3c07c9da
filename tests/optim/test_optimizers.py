"""Compares the table of optimizers with torch's state tensors and DeepSpeed's choices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fgpt.config.deepspeed.settings import DeepSpeedSettings
from fgpt.optim.build import make_optimizer
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
        ("AdamW8bit", {}, "cpu", "bitsandbytes"),
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


@pytest.mark.parametrize(("name", "decay"), [("AdamW8bit", 0.01), ("Adam8bit", 0.0)])
def test_8bit_adam(name: str, decay: float) -> None:
    """States, their bytes and the default decay are those of bitsandbytes."""
    optimizer = OPTIMIZERS[name.lower()]
    weight = torch.nn.Parameter(torch.ones(64, 64))
    made = make_optimizer({"type": name}, [{"params": [weight]}])
    weight.grad = torch.randn(64, 64)
    made.step()
    states = {k: v for k, v in made.state[weight].items() if k in optimizer.states}
    assert states.keys() == set(optimizer.states)
    assert all(v.element_size() == optimizer.state_bytes for v in states.values())
    assert all(v.shape == weight.shape for v in states.values())
    assert made.param_groups[0]["weight_decay"] == optimizer.params["weight_decay"].default == decay
