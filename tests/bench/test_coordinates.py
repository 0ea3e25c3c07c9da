"""`fgpt bench recipe --coordinate-check`: activations over widths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from fgpt.bench import coordinates
from fgpt.bench.recipe import Common, Recipe, TrainingRun
from fgpt.bench.width import width_models
from fgpt.cli.bench_recipe import bench_recipe_verb
from fgpt.errors import UserError
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize
from fgpt.report.coordinate_report import read_coordinate_records
from tests.bench.width_runs import ADAMW, MUON, common_of, interrupted, own_recipe, small

pytestmark = pytest.mark.usefixtures("one_thread")


def slopes(recipe: Recipe, common: Common, widths: list[int]) -> dict[str, dict[str, float]]:
    """Activation -> with muP and without -> slope after 5 steps."""
    models = width_models(recipe, coordinates.at_constant_rate(common), widths)
    found = [(model, coordinates.trace(recipe, model, steps=5, seed=1)) for model in models]
    record = coordinates.as_record(found)
    return {name: {k: kinds[k]["slope"] for k in kinds} for name, kinds in record.items()}


INSIDE = ("blocks.0.mlp", "blocks.1.attention", "blocks.1.mlp", "blocks.1")


def test_changes_are_flat_with_mup_and_grow_without(small_data: Path, tmp_path: Path) -> None:
    found = slopes(own_recipe(tmp_path, ADAMW), common_of(small_data), [32, 64, 256])
    for name, kinds in found.items():
        assert abs(kinds["mup"]) < 0.25, (name, kinds)
    for name in (*INSIDE, "logits"):
        assert found[name]["standard"] > 0.5, (name, found[name])


def test_changes_are_flat_with_muon(small_data: Path, tmp_path: Path) -> None:
    found = slopes(own_recipe(tmp_path, MUON), common_of(small_data), [32, 256])
    assert all(abs(kinds["mup"]) < 0.25 for kinds in found.values()), found
    assert found["blocks.0.mlp"]["standard"] > 0.3


def test_rates_of_matrices_that_muP_does_not_divide_are_found(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check fails where muP has its initial values and logits, but not its learning rates."""
    monkeypatch.setattr("fgpt.engine.plain.matrix_group", lambda *_: None)
    found = slopes(own_recipe(tmp_path, ADAMW), common_of(small_data), [32, 256])
    assert min(found[name]["mup"] for name in INSIDE) > 0.4


def test_changes_are_those_of_a_plain_loop(small_data: Path, tmp_path: Path) -> None:
    """muP's groups, the loop, and the changes written out with torch alone."""
    recipe, width, base, steps = own_recipe(tmp_path, ADAMW), 64, 32, 3
    common = coordinates.at_constant_rate(common_of(small_data))
    model = next(m for m in width_models(recipe, common, [base, width]) if m.mup)
    found = coordinates.trace(recipe, model, steps, seed=1)
    # 1. the same model and samples
    run = TrainingRun(recipe, model.common, steps, seed=1)
    config = run.resolved.run.model
    assert (config.d_model, config.mup_base) == (width, base)
    gpt = GPT(config)
    initialize(gpt, config, seed=1)
    probe = run.valid.at(0)[0]
    # 2. AdamW, in which matrices of blocks have half the rate and twice the decay
    matrices, others, flat = [], [], []
    for name, weight in gpt.named_parameters():
        block = name.startswith("blocks.")
        (flat if weight.ndim < 2 else matrices if block else others).append(weight)
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "lr": 0.002 * base / width, "weight_decay": 0.1 * width / base},
            {"params": others, "weight_decay": 0.1},
            {"params": flat, "weight_decay": 0.0},
        ],
        lr=0.002, betas=(0.9, 0.95),
    )  # fmt: skip

    def activations() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            x = gpt.blocks[0](gpt.embedding(probe.inputs))
            return gpt.blocks[1].mlp(_mlp_input(gpt, x)), gpt(probe.inputs)

    mlp_before, logits_before = activations()
    for step in range(steps):
        (batch,) = run.train.at(step)
        logits = gpt(batch.inputs)
        cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mlp, logits = activations()
        for name, change in (
            ("blocks.1.mlp", mlp - mlp_before),
            ("logits", logits - logits_before),
        ):
            expected = change.square().mean().sqrt().item()
            assert found[name].changes[step] == pytest.approx(expected, rel=1e-3), (name, step)
    assert found["logits"].sizes[0] == pytest.approx(logits_before.square().mean().sqrt().item())


def _mlp_input(gpt: GPT, x: torch.Tensor) -> torch.Tensor:
    block = gpt.blocks[1]
    return block.mlp_norm(x + block.attention(block.attention_norm(x)))


def test_slope_by_hand() -> None:
    widths = [32, 64, 256]
    assert coordinates.slope(widths, [3 * w**0.7 for w in widths]) == pytest.approx(0.7)


def test_a_coordinate_check(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--widths", "64", "32", "--steps", "2", "--seeds", "2", "--precision", "fp32"]
    assert bench_recipe_verb(small(tmp_path, small_data, "coordinate-check", *flags)) == 0
    (record,) = map(json.loads, (tmp_path / "width.jsonl").read_text().splitlines())
    assert record["measurement"] == "coordinate_check" and record["recipe"] == "mine"
    assert record["widths"] == [32, 64] and record["base"] == 32 and record["seeds"] == 2
    assert record["rates"] == {"optimizer.params.lr": 0.002}
    for kinds in record["activations"].values():
        assert kinds["mup"]["changes"][0] == kinds["standard"]["changes"][0]  # the base
        assert [len(c) for c in kinds["mup"]["changes"]] == [2, 2]
        assert [len(c) for c in kinds["mup"]["sizes"]] == [3, 3]
    assert "slope with muP" in capsys.readouterr().out
    assert len(read_coordinate_records([tmp_path / "width.jsonl"])) == 1


def test_interrupted_coordinate_check(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three models: in the first seed, and in the second."""
    trace = coordinates.trace
    flags = ["--widths", "32", "64", "--steps", "1"]
    monkeypatch.setattr(coordinates, "trace", interrupted(2, trace))
    with pytest.raises(UserError, match="interrupted: nothing is recorded: no seed was finished"):
        bench_recipe_verb(small(tmp_path, small_data, "coordinate-check", *flags))
    assert not (tmp_path / "width.jsonl").exists()
    monkeypatch.setattr(coordinates, "trace", interrupted(4, trace))
    with pytest.raises(KeyboardInterrupt):
        bench_recipe_verb(small(tmp_path, small_data, "coordinate-check", *flags))
    assert json.loads((tmp_path / "width.jsonl").read_text())["seeds"] == 1


def test_fewer_seeds_fit(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--widths", "32", "64", "--steps", "1", "--minutes", "0.001"]
    assert bench_recipe_verb(small(tmp_path, small_data, "coordinate-check", *flags)) == 0
    assert "seeds that fit into --minutes: 1, not 3" in capsys.readouterr().out
