"""Gradients read before a step equal the plain engine's, with any optimizer and ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from tests.engine.runs import micro_batches, resolved_run, variant
from tests.ranks import run_ranks

SGD = {"type": "SGD", "params": {"lr": 0.1}}


def first_gradients(
    world: World, folder: Path, config: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Train two steps; return the gradients of the first and check that later ones are not read."""
    resolved = resolved_run(folder / str(world.rank), config, world.size, **settings)
    engine = build_engine(resolved, world, torch.device("cpu"))
    found: list[dict[str, Tensor]] = []
    engine.on_gradients = lambda: found.append({n: g.clone() for n, g in engine.gradients()})
    engine.train_batch(micro_batches(resolved, world, 0)).result()
    engine.on_gradients = None
    engine.train_batch(micro_batches(resolved, world, 1)).result()
    engine.close()
    assert len(found) == 1
    return found[0]


def of_all_stages(world: World, folder: Path) -> dict[str, dict[str, Tensor]]:
    """ZeRO section -> gradients, with SGD."""
    sections: list[dict[str, Any]] = [{"stage": stage} for stage in range(4)]
    sections += [{"stage": stage, "round_robin_gradients": True} for stage in (1, 2)]
    found = {}
    for section in sections:
        config = variant(optimizer=SGD, zero_optimization=section)
        del config["scheduler"]
        if section["stage"] > 0:
            config["zero_allow_untested_optimizer"] = True
        found[str(section)] = first_gradients(world, folder, config, {})
    return found


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_gradients_before_a_step(tmp_path: Path) -> None:
    plain = {"train__engine": "plain"}
    config = variant(zero_optimization={"stage": 0})
    (wanted,) = run_ranks(first_gradients, 1, tmp_path / "plain", config, plain)
    for stages in run_ranks(of_all_stages, 2, tmp_path / "ranks"):
        for stage, gradients in stages.items():
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                assert gradient.dtype == torch.float32
                away = (gradient - wanted[name]).norm() / wanted[name].norm()
                # a key's bias has no true gradient: rounding noise in its third of qkv.bias
                assert away < 1e-4, (stage, name, float(away))
