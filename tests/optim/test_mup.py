"""muP's learning rates, under every schedule, against groups with rates of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fgpt.config.schema import ScheduleConfig
from fgpt.engine.plain import PlainEngine
from fgpt.optim.build import LearningRateFactors, make_optimizer, matrix_group, parameter_groups
from fgpt.optim.optimizers import is_matrix
from fgpt.optim.schedules import learning_rate
from tests.model.test_gpt import TINY, built, tokens

MUP = replace(TINY, mup_base=16)  # m = 4
PARAMS = {"lr": 1e-2, "betas": [0.8, 0.9], "eps": 1e-9, "weight_decay": 0.1}
COSINE = {"type": "WarmupCosineLR", "params": {"total_num_steps": 8, "warmup_num_steps": 2}}


@pytest.mark.parametrize(
    ("optimizer", "params", "factor"),
    [
        ("AdamW", {}, 1 / 4),
        ("Lion", {}, 1 / 4),
        ("AdamW8bit", {}, 1 / 4),
        ("Muon", {}, 1.0),
        ("Muon", {"adjust_lr_fn": "match_rms_adamw"}, 1 / 2),
    ],
)
def test_rates_of_matrices(optimizer: str, params: dict[str, Any], factor: float) -> None:
    """Weight decay times rate is that of the base."""
    matrices = matrix_group({"type": optimizer, "params": {**PARAMS, **params}}, MUP)
    assert matrices is not None
    assert (matrices.rate, matrices.other_rate) == (factor, 1.0)
    assert matrices.weight_decay * matrices.rate == pytest.approx(0.1)


def test_a_decay_that_is_added_to_gradients_keeps_its_share() -> None:
    """At m = 4 gradients of matrices are 1 / 4, their weights 1 / 2: so must the decay be 1 / 2."""
    for kind, params in (("Adam", {"adam_w_mode": False}), ("Adagrad", {})):
        matrices = matrix_group({"type": kind, "params": {**PARAMS, **params}}, MUP)
        assert matrices is not None and matrices.weight_decay == pytest.approx(0.1 / 2)
    decoupled = matrix_group({"type": "Adam", "params": PARAMS}, MUP)
    assert decoupled is not None and decoupled.weight_decay == pytest.approx(0.1 * 4)


def test_muon_keeps_its_adam_rate() -> None:
    section = {"type": "Muon", "params": {"lr": 1e-2, "adam_lr": 3e-2}}
    matrices = matrix_group(section, MUP)
    assert matrices is not None and matrices.other_rate == pytest.approx(3.0)


def test_steps_are_those_of_torch_with_a_rate_for_each_group() -> None:
    section: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": PARAMS}}
    section |= {"scheduler": COSINE, "gradient_clipping": 0.0}
    engine = PlainEngine(
        built(MUP), section, torch.float32, torch.device("cpu"), 1, ScheduleConfig()
    )
    model = built(MUP)
    matrices, others, plain = [], [], []
    for name, parameter in model.named_parameters():
        if is_matrix(name, parameter.dim()):
            matrices.append(parameter)
        else:
            (others if parameter.dim() >= 2 else plain).append(parameter)
    # AdamW multiplies the decay by the rate: 0.1 at the base
    groups = [
        {"params": matrices, "weight_decay": 0.4},
        {"params": others, "weight_decay": 0.1},
        {"params": plain, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.9), eps=1e-9)
    ids = tokens(MUP)
    for step in range(6):
        rate = learning_rate(COSINE, 1e-2, step)
        for group, factor in zip(adam.param_groups, (1 / 4, 1, 1), strict=True):
            group["lr"] = rate * factor
        for parameters in (model, engine.model):
            parameters(ids, ids.roll(-1, dims=1)).backward()
        adam.step()
        adam.zero_grad()
        assert engine._set_rates() == pytest.approx(rate)
        engine._update_weights()
        engine.optimizer.zero_grad()
        engine.step += 1
    for (name, mine), theirs in zip(
        engine.model.named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, msg=name)


def test_rates_are_restored_after_a_step() -> None:
    model = built(MUP)
    section = {"type": "AdamW", "params": PARAMS}
    groups = parameter_groups(model.named_parameters(), matrix_group(section, MUP))
    optimizer = make_optimizer(section, groups)
    LearningRateFactors(optimizer)
    model(tokens(MUP)).sum().backward()
    whole = optimizer.param_groups
    for part in (whole, whole[:1], whole[1:2]):  # DeepSpeed's offload steps one group at a time
        optimizer.param_groups = list(part)
        optimizer.step()
        assert [group["lr"] for group in part] == [1e-2] * len(part)
