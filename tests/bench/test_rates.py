"""`fgpt bench recipe --rate-transfer`: the best learning rate over widths."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.bench import rates
from fgpt.bench.rates import RateCurve, at_power, rates_of
from fgpt.bench.recipe import Common, Recipe, TrainingRun
from fgpt.bench.width import WidthModel
from fgpt.cli.bench_recipe import bench_recipe_verb
from fgpt.errors import UserError
from fgpt.report.rate_report import read_rate_records
from tests.bench.width_runs import ADAMW, MUON, common_of, interrupted, own_recipe, small

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        (ADAMW, {"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}),
        (ADAMW, {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-5, "warmup_max_lr": 0.004}}),
        (MUON, {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}),
        (MUON, None),
        ({**MUON, "params": {"muon_lr": 0.01, "adam_lr": 0.02}}, None),
        ({"type": "AdamW", "params": {}}, {"type": "WarmupLR", "params": {}}),
        ({"type": "AdamW", "params": {}}, None),
    ],
)
def test_all_rates_of_a_recipe_are_multiplied(
    optimizer: dict[str, Any], scheduler: dict[str, Any] | None, small_data: Path, tmp_path: Path
) -> None:
    """Of the steps that the engine takes, and of each parameter group."""
    recipe, common = own_recipe(tmp_path, optimizer), common_of(small_data)
    content = json.loads(recipe.deepspeed.read_text())
    recipe.deepspeed.write_text(json.dumps({**content, "scheduler": scheduler}))
    common = replace(common, run={**common.run, "model.d_model": 32, "model.n_head": 1})
    taken = []
    for power in (0, -2):
        run = TrainingRun(recipe, at_power(common, rates_of(recipe, common), power), 8, seed=1)
        run.advance(3)
        engine: Any = run.engine
        groups = engine.optimizer.param_groups
        taken.append([group["lr"] * group.get("lr_factor", 1) for group in groups])
    assert taken[1] == pytest.approx([rate / 4 for rate in taken[0]])
    assert min(taken[0]) > 0


def test_best_and_parabola() -> None:
    curve = RateCurve(64, True, {p: 3 + 0.2 * (p - 1.3) ** 2 for p in range(-1, 4)})
    assert curve.best == 1 and curve.beyond is None
    assert curve.vertex == pytest.approx(1.3)
    ends = RateCurve(64, True, {0: 3.0, 1: 4.0, 2: math.inf})
    assert (ends.best, ends.beyond, ends.vertex) == (0, -1, None)
    assert RateCurve(64, True, {0: 5.0, 1: 4.0}).beyond == 2
    assert RateCurve(64, True, {0: math.inf, 1: math.inf}).beyond is None


def parabola(best: float) -> Any:
    """A `_loss` that is lowest at this power of the rate 0.002, and diverges above 2^6."""

    def loss(recipe: Recipe, common: Common, steps: int, seeds: int) -> float:
        keys = ("scheduler.params.warmup_max_lr", "optimizer.params.lr")
        rate = next(common.deepspeed[key] for key in keys if key in common.deepspeed)
        power = math.log2(rate / 0.002)
        shift = math.log2(common.run["model.d_model"] / 32) * ("model.mup_base" not in common.run)
        return math.inf if power > 6 else 3 + (power - best + shift) ** 2

    return loss


@pytest.mark.parametrize(
    ("best", "powers", "at_end"),
    [(1.2, 4, False), (4.2, 6, False), (6.0, 6, True), (-2.0, 6, True)],
)
def test_the_grid_is_extended(
    best: float, powers: int, at_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_loss", parabola(best))
    no_data: Any = None
    common = Common({"model.d_model": 32}, {}, no_data, torch.device("cpu"))
    told: list[int] = []
    curve = rates.train(
        Recipe("a", Path("x")), WidthModel(32, False, common), {"optimizer.params.lr": 0.002},
        range(4), 5, 1, lambda _, power: told.append(power),
    )  # fmt: skip
    assert len(curve.losses) == powers and told == list(curve.losses)
    assert (curve.beyond is not None) == at_end


def test_a_rate_transfer(
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The best rate stays with muP and moves without; the base's rates are tried at all widths."""
    monkeypatch.setattr(rates, "_loss", parabola(3.1))
    flags = ["--widths", "32", "64", "128", "--powers", "-1", "3", "--steps", "5"]
    assert bench_recipe_verb(small(tmp_path, small_data, "rate-transfer", *flags)) == 0
    (record,) = map(json.loads, (tmp_path / "width.jsonl").read_text().splitlines())
    found = [(c["d_model"], c["mup"], c["best"]) for c in record["curves"]]
    assert found == [(32, False, 3), (64, True, 3), (128, True, 3), (64, False, 2), (128, False, 1)]
    assert all(curve["powers"] == [-1, 0, 1, 2, 3, 4] for curve in record["curves"])
    assert record["curves"][4]["vertex"] == pytest.approx(1.1)
    assert record["steps"] == 5
    assert "warning: 5 steps hardly leave the warm-up" in capsys.readouterr().out
    assert len(read_rate_records([tmp_path / "width.jsonl"])) == 1


def test_a_rate_transfer_trains(small_data: Path, tmp_path: Path) -> None:
    """Losses are those of the runs with these rates, written by hand into the JSON."""
    flags = ["--widths", "32", "64", "--powers", "0", "2", "--steps", "3", "--precision", "fp32"]
    flags += ["--seeds", "2"]
    assert bench_recipe_verb(small(tmp_path, small_data, "rate-transfer", *flags)) == 0
    (record,) = map(json.loads, (tmp_path / "width.jsonl").read_text().splitlines())
    curve = next(c for c in record["curves"] if c["mup"])
    optimizer = {**ADAMW, "params": {**ADAMW["params"], "lr": 0.004}}
    recipe = own_recipe(tmp_path, optimizer, d_model=64, n_head=2, mup_base=32)
    common = common_of(small_data)
    common = replace(common, run={**common.run, "data.seq_len": 16})
    losses = []
    for seed in (1, 2):
        run = TrainingRun(recipe, common, steps=3, seed=seed)
        run.advance(3)
        losses.append(run.point().loss)
    loss = curve["losses"][curve["powers"].index(1)]
    assert losses[0] != losses[1] and loss == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_interrupted_rate_transfer(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rates for each of three models: in the second model, and in the third."""
    flags = ["--widths", "32", "64", "--powers", "0", "2", "--steps", "1"]
    monkeypatch.setattr(rates, "_loss", interrupted(5, parabola(1.1)))
    with pytest.raises(UserError, match="interrupted: nothing is recorded: 1 of the models have"):
        bench_recipe_verb(small(tmp_path, small_data, "rate-transfer", *flags))
    assert not (tmp_path / "width.jsonl").exists()
    monkeypatch.setattr(rates, "_loss", interrupted(7, parabola(1.1)))
    with pytest.raises(KeyboardInterrupt):
        bench_recipe_verb(small(tmp_path, small_data, "rate-transfer", *flags))
    record = json.loads((tmp_path / "width.jsonl").read_text())
    assert [curve["mup"] for curve in record["curves"]] == [False, True]


def test_rates_that_all_diverge_are_said(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_loss", lambda *_: math.inf)
    flags = ["--widths", "32", "64", "--powers", "0", "2", "--steps", "1"]
    with pytest.raises(UserError, match="width 32 diverged with every rate: name lower --powers"):
        bench_recipe_verb(small(tmp_path, small_data, "rate-transfer", *flags))
    assert not (tmp_path / "width.jsonl").exists()


def test_fewer_steps_fit(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_loss", parabola(1.1))
    monkeypatch.setattr(rates, "step_seconds", lambda *_: 0.1)
    flags = ["--widths", "32", "64", "--powers", "0", "2", "--minutes", "1"]
    assert bench_recipe_verb(small(tmp_path, small_data, "rate-transfer", *flags)) == 0
    # 60 s x 0.9 / (3 models x 4 rates x 0.1 s) - 3 for the evaluation, less the time until then
    steps = json.loads((tmp_path / "width.jsonl").read_text())["steps"]
    assert 38 <= steps <= 42
