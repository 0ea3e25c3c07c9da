"""The plain engine's schedules against DeepSpeed's classes, step by step."""

import pytest
import torch

from fgpt.model.gpt import GPT
from fgpt.optim.build import make_optimizer, parameter_groups
from fgpt.optim.schedules import learning_rate
from tests.model.test_gpt import TINY, built

BASE = 3e-4
SECTIONS = {
    "constant": None,
    "cosine": ("WarmupCosineLR", {"total_num_steps": 30, "warmup_num_steps": 6}),
    "cosine-linear": (
        "WarmupCosineLR",
        {
            "total_num_steps": 30,
            "warmup_num_steps": 6,
            "warmup_type": "linear",
            "warmup_min_ratio": 0.1,
            "cos_min_ratio": 0.2,
        },
    ),
    "cosine-short": ("WarmupCosineLR", {"total_num_steps": 4, "warmup_num_steps": 1}),
    "warmup": ("WarmupLR", {"warmup_num_steps": 8}),
    "warmup-max": (
        "WarmupLR",
        {
            "warmup_min_lr": 1e-5,
            "warmup_max_lr": 2e-4,
            "warmup_num_steps": 8,
            "warmup_type": "linear",
        },
    ),
    "decay": ("WarmupDecayLR", {"total_num_steps": 25, "warmup_num_steps": 5}),
    "decay-linear": (
        "WarmupDecayLR",
        {
            "total_num_steps": 25,
            "warmup_num_steps": 5,
            "warmup_min_lr": 1e-6,
            "warmup_max_lr": 5e-4,
            "warmup_type": "linear",
        },
    ),
    "range": ("LRRangeTest", {"lr_range_test_step_size": 4, "lr_range_test_step_rate": 0.5}),
    "stairs": (
        "LRRangeTest",
        {
            "lr_range_test_min_lr": 1e-4,
            "lr_range_test_step_size": 4,
            "lr_range_test_staircase": True,
        },
    ),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_rates_are_deepspeeds(name):
    from deepspeed.runtime import lr_schedules

    section = SECTIONS[name]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    schedule = getattr(lr_schedules, section[0])(optimizer, **section[1]) if section else None
    json = {"type": section[0], "params": section[1]} if section else None
    for step in range(40):
        assert learning_rate(json, BASE, step) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18
        ), step
        if schedule:
            schedule.step()


def test_groups_decay_matrices_only():
    model = built(TINY)
    decayed, plain = parameter_groups(model.named_parameters())
    assert "weight_decay" not in decayed and plain["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("kind", "mode", "decoupled"),
    [("AdamW", {}, True), ("Adam", {}, True), ("Adam", {"adam_w_mode": False}, False)],
)
def test_adam_of_the_json(kind, mode, decoupled):
    params = {"lr": 0.1, "weight_decay": 0.5, "torch_adam": True, **mode}
    optimizer = make_optimizer(
        {"type": kind, "params": params}, parameter_groups(GPT(TINY).named_parameters())
    )
    assert isinstance(optimizer, torch.optim.AdamW) is decoupled
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
