"""train.ema: the average by its definition, equal in every layout; training does not notice it."""

from __future__ import annotations

import pytest
import torch

from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from fgpt.engine.state import EMA
from tests.engine.runs import full_weights, micro_batches, resolved_run, variant
from tests.ranks import run_ranks

STEPS, DECAY = 12, 0.5
MUON = {"optimizer": {"type": "Muon", "params": {"lr": 3e-3}}}


def averaged_run(world, folder, config, settings):
    """Losses of the weights and of the average, the averaged weights, and the weights around."""
    settings = {"train__ema": DECAY, **settings}
    resolved = resolved_run(folder / str(world.rank), config, world.size, **settings)
    engine = build_engine(resolved, world, torch.device("cpu"))
    by_hand = full_weights(engine)
    out = {"loss": [], "ema": []}
    for step in range(STEPS):
        pending = engine.train_batch(micro_batches(resolved, world, step))
        assert not pending.result().skipped
        decay = min(DECAY, (2 + step) / (11 + step))
        for name, weight in full_weights(engine).items():
            by_hand[name] = decay * by_hand[name] + (1 - decay) * weight
        batches = micro_batches(resolved, world, 0)
        out["loss"].append(float(engine.eval_batches(batches)))
        with engine.averaged():
            out["ema"].append(float(engine.eval_batches(batches)))
            inside = full_weights(engine)
    out["weights"], out["average"] = full_weights(engine), inside
    out["by_hand"] = by_hand
    with engine.saving() as tensors:
        out["saved"] = sorted({tensor.state for tensor in tensors})
    engine.close()
    return out


def several(world, folder, cases):
    return {name: averaged_run(world, folder, *case) for name, case in cases.items()}


def difference(found, wanted):
    return max(
        float((found[n] - w).norm() / w.norm()) for n, w in wanted.items() if "bias" not in n
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The plain engine's run."""
    folder = tmp_path_factory.mktemp("plain")
    return averaged_run(World(), folder, variant(**MUON), {"train__engine": "plain"})


def test_the_average_is_its_definition(plain):
    assert difference(plain["average"], plain["by_hand"]) < 1e-6
    assert difference(plain["average"], plain["weights"]) > 1e-3  # and not the weights
    assert plain["loss"] != plain["ema"]
    assert EMA in plain["saved"]


def test_training_does_not_notice_it(plain, tmp_path):
    settings = {"train__engine": "plain", "train__ema": None}
    resolved = resolved_run(tmp_path, variant(**MUON), 1, **settings)
    engine = build_engine(resolved, World(), torch.device("cpu"))
    for step in range(STEPS):
        engine.train_batch(micro_batches(resolved, World(), step))
    for name, weight in full_weights(engine).items():
        assert torch.equal(weight, plain["weights"][name]), name
    assert engine.average is None


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_layouts(plain, tmp_path):
    cases = {
        "zero1": ({"stage": 1}, {}),
        "zero3": ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, {}),
        "tp2": ({"stage": 0}, {"parallel__tp": 2}),
        "pp2": ({"stage": 1}, {"parallel__pp": 2}),
    }
    runs = {name: (variant(zero_optimization=z, **MUON), s) for name, (z, s) in cases.items()}
    both = run_ranks(several, 2, tmp_path, runs, timeout_s=170)
    for name, run in both[0].items():
        losses = [sum(each) / 2 for each in zip(run["ema"], both[1][name]["ema"], strict=True)]
        assert losses == pytest.approx(plain["ema"], rel=1e-5), name
        assert difference(run["average"], plain["average"]) < 1e-5, name
        assert difference(run["weights"], plain["weights"]) < 1e-5, name
        assert EMA in run["saved"], name


def test_a_skipped_step_does_not_move_it(tmp_path):
    settings = {"train__engine": "plain", "train__ema": DECAY}
    resolved = resolved_run(tmp_path, variant(), 1, **settings)
    engine = build_engine(resolved, World(), torch.device("cpu"))
    engine.train_batch(micro_batches(resolved, World(), 0))
    before = [tensor.clone() for tensor in engine.average.tensors]

    def spoil():
        for _, master in engine.masters:
            master.grad.fill_(torch.nan)

    engine.on_gradients = spoil
    assert engine.train_batch(micro_batches(resolved, World(), 1)).result().skipped
    assert all(map(torch.equal, before, engine.average.tensors))
