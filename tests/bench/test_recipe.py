"""`fgpt bench recipe`: its curves, and what it concludes from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fgpt.bench.recipe import Curve, Point, Recipe, TrainingRun, check_baseline, reached, summary
from fgpt.bench.record import _strip_folder
from fgpt.cli.bench_recipe import bench_recipe_verb
from fgpt.errors import ConfigError, DataError, TrainingError, UserError


def curve(name: str, seed: int, *points: tuple[int, float, float]) -> Curve:
    return Curve(Recipe(name, Path("x.json")), seed, [Point(*p) for p in points])


def test_reached_is_on_the_line_between_two_points() -> None:
    points = [Point(0, 0.0, 8.0), Point(100, 10.0, 6.0), Point(200, 30.0, 6.5), Point(300, 40.0, 5)]
    assert reached(points, 7.0) == (50, 5.0)
    assert reached(points, 6.0) == (100, 10.0)
    assert reached(points, 5.75) == (250, 35.0)
    assert reached(points, 4.9) is None
    assert reached([Point(0, 0.0, 3.0), Point(1, 1.0, 2.0)], 3.5) == (0, 0)


def test_summary_by_hand() -> None:
    curves = [
        curve("old", 1, (0, 0.0, 8.0), (100, 10.0, 6.0), (200, 20.0, 4.0)),
        curve("new", 1, (0, 0.0, 8.0), (100, 12.0, 4.0), (200, 24.0, 3.0)),
        curve("bad", 1, (0, 0.0, 8.0), (100, 10.0, 7.0), (200, 20.0, 5.0)),
        curve("old", 2, (0, 0.0, 8.0), (100, 10.0, 7.0), (200, 22.0, 5.0)),
        curve("new", 2, (0, 0.0, 8.0), (100, 11.0, 6.0), (200, 22.0, 4.0)),
        curve("bad", 2, (0, 0.0, 8.0), (100, 10.0, 7.0), (200, 20.0, 4.5)),
    ]
    found = summary(curves, "old")
    assert found["old"]["tokens"] == [1.0, 1.0, 1.0]
    assert found["old"]["loss"] == [4.5, 4.0, 5.0]
    # seed 1: loss 4.0 at 100 tokens and 12 s; seed 2: loss 5.0 at 150 tokens and 16.5 s
    assert found["new"]["tokens"] == pytest.approx([0.625, 0.5, 0.75])
    assert found["new"]["seconds"] == pytest.approx([0.675, 0.6, 0.75])
    assert found["new"]["step_time"] == pytest.approx([1.1, 1.0, 1.2])
    assert found["bad"]["tokens"] is None  # seed 1 never gets there


def small(tmp_path: Path, *more: str) -> list[str]:
    steps = ["--steps", "6", "--minutes", "9", "--global_batch", "2", "--seq_len", "16"]
    return [*steps, "--out", str(tmp_path / "recipe.jsonl"), *more]


def test_a_short_comparison(small_data: Path, tmp_path: Path, capsys: object) -> None:
    """Curves start from one loss in each seed, and seeds differ; the record has them all."""
    own = tmp_path / "own.json"
    optimizer = {"type": "Muon", "params": {"lr": 0.01, "adjust_lr_fn": "match_rms_adamw"}}
    own.write_text(json.dumps({"gradient_clipping": 1.0, "optimizer": optimizer}))
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"schedule": {"kind": "linear", "warmup_steps": 2}}))
    flags = ["--recipe", "adamw", "--recipe", f"mine={own},{run}", "--seeds", "2"]
    flags += ["--precision", "fp32", "--data", str(small_data)]
    assert bench_recipe_verb(small(tmp_path, *flags)) == 0
    (record,) = map(json.loads, (tmp_path / "recipe.jsonl").read_text().splitlines())
    assert record["measurement"] == "recipe" and record["precision"] == "fp32"
    assert record["tokens"] == 6 * 2 * 16
    first = {}
    for line in record["curves"]:
        tokens, seconds, losses = zip(*line["points"], strict=True)
        assert tokens[0] == 0 and tokens[-1] == record["tokens"]
        assert list(seconds) == sorted(seconds) and seconds[0] == 0
        assert losses[-1] < losses[0]
        first.setdefault(line["seed"], set()).add(losses[0])
    assert all(len(losses) == 1 for losses in first.values())
    assert first[1] != first[2]
    assert record["values"].keys() == {"adamw", "mine"}


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (["--recipe", "nothing"], UserError, "write one of adamw, nanogpt, muon, or NAME="),
        (["--recipe", "muon", "--recipe", "muon=x.json"], UserError, "the same name"),
        (["--recipe", "mine=missing.json"], ConfigError, "missing.json"),
        (["--data", "nowhere"], DataError, "nowhere"),
        (
            ["--recipe", "adamw", "--recipe", "b={json},{wide}"],
            UserError,
            "b: model.d_model 32, ad",
        ),
    ],
)
def test_bad_input(
    flags: list[str], error: type[Exception], words: str, small_data: Path, tmp_path: Path
) -> None:
    files = own_files(tmp_path, wide={"model": {"d_model": 32}})
    flags = [flag.format(**files) if "{" in flag else flag for flag in flags]
    data = [] if "--data" in flags else ["--data", str(small_data)]
    with pytest.raises(error, match=words):
        bench_recipe_verb(small(tmp_path, *data, *flags))
    assert not (tmp_path / "recipe.jsonl").exists()


def own_files(folder: Path, **run_files: object) -> dict[str, Path]:
    """A DeepSpeed JSON and these run files, by name."""
    files = {"json": folder / "own.json", **{name: folder / f"{name}.json" for name in run_files}}
    files["json"].write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}))
    for name, content in run_files.items():
        files[name].write_text(json.dumps(content))
    return files


def test_names_and_precisions_are_printed_as_they_are(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = own_files(tmp_path)
    flags = ["--recipe", f"[b]={files['json']}", "--recipe", "adamw", "--data", str(small_data)]
    assert bench_recipe_verb(small(tmp_path, *flags)) == 0
    assert "tiny, fp32 and bf16, 6 steps" in (output := capsys.readouterr().out)
    assert "tokens to [b]'s loss" in output


def test_the_seeds_before_a_failure_are_recorded(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(TrainingRun):
        def advance(self, steps: int) -> None:
            if self.resolved.run.train.seed == 2:
                raise KeyboardInterrupt
            super().advance(steps)

    monkeypatch.setattr("fgpt.bench.recipe.TrainingRun", Stopped)
    flags = small(tmp_path, "--recipe", "adamw", "--seeds", "3", "--data", str(small_data))
    with pytest.raises(KeyboardInterrupt):
        bench_recipe_verb(flags)
    (record,) = map(json.loads, (tmp_path / "recipe.jsonl").read_text().splitlines())
    assert record["seeds"] == 1 and [line["seed"] for line in record["curves"]] == [1]


def test_a_baseline_that_diverges_is_said() -> None:
    with pytest.raises(TrainingError, match="ends at validation loss 9.000 and began at 8.000"):
        check_baseline(curve("old", 1, (0, 0.0, 8.0), (100, 10.0, 9.0)))
    check_baseline(curve("old", 1, (0, 0.0, 8.0), (100, 10.0, 7.9)))


def test_records_have_no_local_folders() -> None:
    texts = ("/a/b", "mine=/a/b.json,/c/d.json", "mine=a/b.json,/c/d.json", "a/b")
    assert [*map(_strip_folder, texts)] == [
        "b",
        "mine=b.json,d.json",
        "mine=a/b.json,d.json",
        "a/b",
    ]
