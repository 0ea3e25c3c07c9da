"""`fgpt bench recipe --coordinate-check` and `--rate-transfer`: muP over widths."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from fgpt.bench import coordinates, rates
from fgpt.bench.rates import RateCurve, at_power, rates_of
from fgpt.bench.recipe import Common, Recipe, TrainingRun
from fgpt.bench.width import WidthModel, shapes_at, width_models
from fgpt.cli.bench_recipe import bench_recipe_verb
from fgpt.config.presets import PRESETS
from fgpt.config.schema import Shapes
from fgpt.data.token_dataset import open_blended_dataset
from fgpt.errors import UserError
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize
from fgpt.report.coordinate_report import read_coordinate_records
from fgpt.report.rate_report import read_rate_records


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["tiny", "llama-tiny", "qwen3-0.6b", "seed-1m", "gpt2"])
def test_shapes_are_in_proportion(name: str) -> None:
    base = PRESETS[name]
    own, widths = Shapes.of(base), [base.d_model // 4, base.d_model // 2, base.d_model]
    found = shapes_at(base, widths)
    assert len({fields["d_head"] for fields in found.values()}) == 1
    for width, fields in found.items():
        share = width / base.d_model
        sizes = {name: fields[name] * fields["d_head"] for name in ("n_head", "n_kv_head")}
        assert sizes["n_head"] == share * own.n_head * own.d_head
        assert sizes["n_kv_head"] == share * own.n_kv_head * own.d_head
        assert fields["d_ff"] == share * own.d_ff


def test_heads_keep_their_width_where_it_divides() -> None:
    assert shapes_at(PRESETS["tiny"], [64, 512])[64]["d_head"] == 64
    assert shapes_at(PRESETS["tiny"], [32, 64])[64]["d_head"] == 32
    assert shapes_at(PRESETS["llama-tiny"], [64, 128])[64] == {
        "d_model": 64, "d_head": 32, "n_head": 2, "n_kv_head": 1, "d_ff": 176
    }  # fmt: skip


def own_recipe(folder: Path, optimizer: dict[str, Any], **model: int) -> Recipe:
    """A recipe that warms up, and a model of two blocks."""
    ds, run = folder / "own.json", folder / "run.json"
    scheduler = {"warmup_num_steps": "auto", "total_num_steps": "auto", "warmup_max_lr": "auto"}
    content = {"gradient_clipping": 1.0, "optimizer": optimizer}
    content["scheduler"] = {"type": "WarmupDecayLR", "params": scheduler}
    ds.write_text(json.dumps(content))
    run.write_text(json.dumps({"model": {"n_layer": 2, **model}}))
    return Recipe("mine", ds, run)


ADAMW = {"type": "AdamW", "params": {"lr": 0.002, "betas": [0.9, 0.95], "weight_decay": 0.1}}
MUON = {"type": "Muon", "params": {"lr": 0.01, "adam_lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}}


def common_of(small_data: Path) -> Common:
    data = open_blended_dataset(str(small_data))
    run = {"model.preset": "tiny", "data.path": str(small_data), "data.seq_len": 32}
    run |= {"model.vocab_size": data.tokenizer.vocab_size, "speed.compile": "off"}
    deepspeed = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4}
    return Common(run, deepspeed, data, torch.device("cpu"))


def small(tmp_path: Path, small_data: Path, mode: str, *more: str) -> list[str]:
    recipe = own_recipe(tmp_path, ADAMW)
    flags = [f"--{mode}", "--global_batch", "4", "--seq_len", "16", "--data", str(small_data)]
    flags += ["--recipe", f"mine={recipe.deepspeed},{recipe.run_file}"]
    return [*flags, "--out", str(tmp_path / "width.jsonl"), *more]


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
    """The check of the check: with initial values and logits of muP, and no rates of its own."""
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
        groups = run.engine.optimizer.param_groups  # type: ignore[attr-defined]
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
    common: Any = Common({"model.d_model": 32}, {}, None, torch.device("cpu"))  # type: ignore[arg-type]
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
    optimizer = {**ADAMW, "params": {**ADAMW["params"], "lr": 0.004}}  # type: ignore[dict-item]
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


@pytest.mark.parametrize(
    ("mode", "flags", "words"),
    [
        ("coordinate-check", ["--widths", "64"], "--widths 64: one width has nothing to compare"),
        ("coordinate-check", ["--widths", "62", "93"], "no heads of one even width from 8 to 64"),
        ("rate-transfer", ["--widths", "64", "64"], "--widths 64: one width"),
        ("rate-transfer", ["--powers", "1", "2"], "--powers 1 2: a grid has three rates or more"),
        ("rate-transfer", ["--recipe", "b={json},{wide}"], "b: model.d_model 32: leave it out of"),
        ("coordinate-check", ["--recipe", "b={json},{mup}"], "b: model.mup_base 32: leave it out"),
    ],
)
def test_bad_input(
    mode: str, flags: list[str], words: str, small_data: Path, tmp_path: Path
) -> None:
    files = {"json": tmp_path / "own.json", "wide": tmp_path / "w.json", "mup": tmp_path / "m.json"}
    files["wide"].write_text(json.dumps({"model": {"d_model": 32}}))
    files["mup"].write_text(json.dumps({"model": {"mup": {"base": 32}}}))
    flags = [flag.format(**files) for flag in flags]
    with pytest.raises(UserError, match=words) as caught:
        bench_recipe_verb(small(tmp_path, small_data, mode, *flags))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "width.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ladder", "--rate-transfer"], "not allowed with argument"),
        (["--widths", "32", "64"], "--widths is for --coordinate-check and --rate-transfer"),
        (["--coordinate-check", "--powers", "0", "2"], "--powers is for --rate-transfer"),
    ],
)
def test_flags_that_contradict(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_recipe_verb(flags)
    assert words in capsys.readouterr().err


def interrupted(calls: int, function: Any) -> Any:
    """The function, which is interrupted when it is called once more."""
    left = [None] * calls

    def call(*arguments: Any, **named: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return function(*arguments, **named)

    return call


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


def test_fewer_seeds_and_steps_fit(
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--widths", "32", "64", "--steps", "1", "--minutes", "0.001"]
    assert bench_recipe_verb(small(tmp_path, small_data, "coordinate-check", *flags)) == 0
    assert "seeds that fit into --minutes: 1, not 3" in capsys.readouterr().out
    monkeypatch.setattr(rates, "_loss", parabola(1.1))
    monkeypatch.setattr(rates, "step_seconds", lambda *_: 0.1)
    flags = ["--widths", "32", "64", "--powers", "0", "2", "--minutes", "1"]
    assert bench_recipe_verb(small(tmp_path, small_data, "rate-transfer", *flags)) == 0
    # 60 s x 0.9 / (3 models x 4 rates x 0.1 s) - 3 for the evaluation, less the time until then
    steps = json.loads((tmp_path / "width.jsonl").read_text().splitlines()[1])["steps"]
    assert 38 <= steps <= 42
