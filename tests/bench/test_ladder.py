"""`fgpt bench recipe --ladder`: its sizes, its plan, its runs and its record."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fgpt.bench import ladder
from fgpt.bench.ladder import LadderPoint, Size, conclude, plan, product_parameters, scaled_widths
from fgpt.bench.loss_law import LossLaw
from fgpt.bench.recipe import TrainingRun
from fgpt.cli.bench_recipe import bench_recipe_verb
from fgpt.config.presets import PRESETS
from fgpt.errors import FgptError, UserError
from fgpt.model.count import training_flops_per_token
from fgpt.model.gpt import GPT
from fgpt.report.ladder_report import read_ladder_records

pytestmark = pytest.mark.usefixtures("one_thread")
LAW = LossLaw(E=1.2, A=30, a=0.25, B=80, b=0.28)


@pytest.mark.parametrize("name", ["tiny", "mini", "llama-tiny", "seed-1m", "qwen3-0.6b", "gpt2"])
def test_sizes_are_models_in_proportion(name: str) -> None:
    base = PRESETS[name]
    sizes = [replace(base, **fields) for fields in scaled_widths(base)]
    assert len(sizes) == 5 and sizes[-1].d_model == base.d_model // 2
    counts = [product_parameters(size) for size in sizes]
    assert counts == sorted(set(counts)) and counts[-1] < product_parameters(base)
    for size in sizes:
        assert size.n_layer == base.n_layer and size.n_head % size.n_kv_head == 0
        assert size.d_head is not None and size.d_head % 2 == 0  # rotary
    free = base.d_head is not None and base.d_head * base.n_head != base.d_model
    assert all(free or size.n_head * size.d_head == size.d_model for size in sizes)


def test_the_widths_of_tiny() -> None:
    found = [(f["d_model"], f["n_head"], f["d_head"]) for f in scaled_widths(PRESETS["tiny"])]
    assert found == [(32, 1, 32), (48, 1, 48), (64, 1, 64), (96, 2, 48), (128, 2, 64)]


def test_product_parameters_are_the_weights_of_matrices() -> None:
    """Of blocks and head: all parameters without embeddings, norms and biases."""
    config = replace(PRESETS["tiny"], vocab_size=100, n_layer=2, d_model=32, n_head=2)
    untied = replace(config, tied_head=False)
    matrices = sum(
        weight.numel()
        for name, weight in GPT(untied).named_parameters()
        if weight.ndim == 2 and "embedding" not in name
    )
    assert product_parameters(config) == product_parameters(untied) == matrices


def sized(width: int, step_seconds: float) -> Size:
    config = replace(PRESETS["tiny"], d_model=width, n_head=1)
    flops = 4096 * training_flops_per_token(config, 256)
    common: Any = None
    return Size(common, config, flops, step_seconds)


def test_the_plan_divides_the_time_by_compute() -> None:
    sizes = [sized(64, 0.02), sized(128, 0.05), sized(256, 0.2)]
    runs = plan(sizes, seconds=600)
    assert sum(run.steps * run.size.step_seconds for run in runs) == pytest.approx(600, rel=0.01)
    assert [run.size.name for run in runs[:3]] == ["4 x 64", "4 x 128", "4 x 256"]
    for first in (0, 3, 6):  # one compute, whatever the size
        flops = [run.steps * run.size.flops_per_step for run in runs[first : first + 3]]
        assert max(flops) == pytest.approx(min(flops), rel=0.02)
    assert runs[8].steps == pytest.approx(4 * runs[2].steps, abs=2)
    shorter = plan(sizes, seconds=600, most_steps=40)
    assert max(run.steps for run in shorter) == 40 and shorter[6].steps == 40
    assert min(run.steps for run in plan(sizes, seconds=1e-9)) == 1


def points(widths: list[int], law: LossLaw = LAW) -> list[LadderPoint]:
    found = []
    for width in widths:
        config = replace(PRESETS["tiny"], d_model=width, n_head=1)
        n, per_token = product_parameters(config), training_flops_per_token(config, 256)
        for compute in (1e13, 2e13, 4e13):
            tokens = round(compute / per_token)
            loss = law.predict(n, tokens)
            found.append(LadderPoint(width, 4, n, tokens, compute, 0.1, 1.0, loss))
    return found


def test_the_largest_size_is_left_out() -> None:
    """It is predicted from the others, and has no part in the law."""
    worse = replace(LAW, E=1.4)
    found = conclude([*points([64, 128, 192]), *points([256], law=worse)])
    assert {point.d_model for point in found.fitted} == {64, 128, 192}
    assert [each.point.d_model for each in found.predictions] == [256] * 3
    for each in found.predictions:
        true = each.point.loss - 0.2
        assert each.predicted == pytest.approx(true, rel=1e-4)
        error = each.predicted / each.point.loss - 1
        assert error == pytest.approx(-0.2 / each.point.loss, rel=1e-2)
        assert each.lowest <= each.predicted <= each.highest


def small(tmp_path: Path, small_data: Path, *more: str) -> list[str]:
    """A ladder of a model so small that one takes seconds."""
    own = tmp_path / "own.json"
    optimizer = {"type": "AdamW", "params": {"lr": 0.01}}
    own.write_text(json.dumps({"gradient_clipping": 1.0, "optimizer": optimizer}))
    run = tmp_path / "run.json"
    shapes = {"d_model": 128, "n_head": 2, "n_layer": 1}
    run.write_text(json.dumps({"model": shapes, "schedule": {"kind": "linear"}}))
    flags = ["--ladder", "--global_batch", "2", "--seq_len", "16", "--steps", "24"]
    flags += ["--recipe", f"mine={own},{run}", "--precision", "fp32", "--data", str(small_data)]
    return [*flags, "--out", str(tmp_path / "ladder.jsonl"), *more]


def test_a_short_ladder(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_recipe_verb(small(tmp_path, small_data)) == 0
    (record,) = map(json.loads, (tmp_path / "ladder.jsonl").read_text().splitlines())
    assert record["measurement"] == "ladder" and record["recipe"] == "mine"
    assert record["precision"] == "fp32" and record["diverged"] == []
    runs = [*record["points"], *record["left_out"]]
    assert [run["d_model"] for run in runs] == [w for w in (16, 24, 32, 48, 64) for _ in range(3)]
    assert all(run["n_layer"] == 1 and run["loss"] < math.log(400) for run in runs)
    assert max(run["tokens"] for run in runs) == runs[2]["tokens"] == 24 * 2 * 16
    for run in runs:
        assert run["seconds"] > 0 and run["flops"] / run["tokens"] > 6 * run["parameters"]
    law = LossLaw(**record["constants"])
    for run in runs:
        assert run["predicted"] == pytest.approx(law.predict(run["parameters"], run["tokens"]))
    output = " ".join(capsys.readouterr().out.split())
    assert "warning: the shortest run has" in output and "Left out, 1 x 64 with" in output
    assert len(read_ladder_records([tmp_path / "ladder.jsonl"])) == 1


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (["--recipe", "adamw"], UserError, "mine, adamw: a ladder is of one recipe: name one"),
        (["--seeds", "2"], UserError, "--seeds 2: .* leave --seeds out"),
        (["--model", "nothing"], SystemExit, "2"),
        (["--steps", "2"], UserError, "have 1 to 2 steps: .*token counts do .* -> raise --min"),
    ],
)
def test_bad_input(
    flags: list[str], error: type[BaseException], words: str, small_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        bench_recipe_verb(small(tmp_path, small_data, *flags))
    assert not (tmp_path / "ladder.jsonl").exists()


def test_a_model_too_narrow_is_said() -> None:
    with pytest.raises(UserError, match="d_model 32: a ladder takes 5 widths .* finds 2 -> name"):
        ladder.check_widths(replace(PRESETS["tiny"], d_model=32))


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs have the losses of LAW instead of training; what the list holds happens first."""
    events: list[Any] = []

    def point(recipe: object, planned: ladder.PlannedRun) -> LadderPoint:
        if events and isinstance(event := events.pop(0), BaseException):
            raise event
        model, tokens = planned.size.model, planned.steps * 32
        n = product_parameters(model)
        loss = LAW.predict(n, tokens)
        return LadderPoint(model.d_model, 1, n, tokens, 1e9, 0.1, 0.1, loss)

    monkeypatch.setattr(ladder, "_train", point)
    monkeypatch.setattr(ladder, "step_seconds", lambda *_: 0.01)
    return events


def test_interrupted_after_enough_runs(
    untrained: list[Any], small_data: Path, tmp_path: Path
) -> None:
    """Two computes of five sizes are enough for a law; the record has them."""
    untrained += [None] * 10 + [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        bench_recipe_verb(small(tmp_path, small_data))
    (record,) = map(json.loads, (tmp_path / "ladder.jsonl").read_text().splitlines())
    assert len(record["points"]) == 8 and len(record["left_out"]) == 2
    assert record["constants"]["b"] == pytest.approx(LAW.b, rel=1e-3)


@pytest.mark.parametrize(("n", "why"), [(3, ".*2 runs"), (7, "6 runs determine a law, but no")])
def test_interrupted_too_early(
    n: int, why: str, untrained: list[Any], small_data: Path, tmp_path: Path
) -> None:
    untrained += [None] * n + [KeyboardInterrupt()]
    with pytest.raises(UserError, match=f"{n} runs interrupted: nothing is recorded: {why}"):
        bench_recipe_verb(small(tmp_path, small_data))
    assert not (tmp_path / "ladder.jsonl").exists()


def test_a_run_that_diverges_is_named_and_left_out(
    untrained: list[Any],
    small_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    untrained += [None, ladder.TrainingError("the loss is nan")]
    assert bench_recipe_verb(small(tmp_path, small_data)) == 0
    (record,) = map(json.loads, (tmp_path / "ladder.jsonl").read_text().splitlines())
    (name,) = record["diverged"]
    assert name.startswith("1 x 24, ") and len(record["points"]) == 11
    output = capsys.readouterr().out
    assert f"warning: {name} diverged and is left out: the loss is nan" in output


def test_a_loss_no_better_than_a_guess_has_diverged(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the real runs: a validation loss above log(vocabulary) is no point of a law."""

    class Bad(TrainingRun):
        def point(self) -> Any:
            return super().point()._replace(loss=math.nan if self.engine.step % 2 else 99.0)

    monkeypatch.setattr(ladder, "TrainingRun", Bad)
    with pytest.raises(
        FgptError, match="0 runs finished: nothing is recorded: .* 0 runs do not determine"
    ):
        bench_recipe_verb(small(tmp_path, small_data, "--steps", "8"))
