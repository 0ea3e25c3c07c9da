"""Resuming a run on data in stages, and adding a stage that has not been reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgpt.prepare.pipeline import prepare
from fgpt.tokenizer.spec import TokenizerSpec
from tests.prepare.corpora import small_recipe
from tests.ranks import run_ranks
from tests.tiny import Tiny, train_all, zero

pytestmark = pytest.mark.dist

BEGIN = 10
"""The first sample of the second stage: in step 3 of 4 samples each, which have 32 tokens."""


@pytest.fixture
def annealing(tmp_path: Path, small_data: Path) -> Path:
    """Another data set, of short documents, with the first one's tokenizer."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(120):
        (texts / f"{i:03d}.txt").write_text(" ".join("hgfedcba"[j % 8 :] for j in range(i % 7 + 1)))
    tokenizer = TokenizerSpec(path=str(small_data / "tokenizer.json"))
    prepare(small_recipe(texts, tokenizer=tokenizer), tmp_path / "annealing", progress=False)
    return tmp_path / "annealing"


@pytest.mark.timeout(120)
def test_stages_are_resumed_exactly(tiny: Tiny, annealing: Path) -> None:
    staged = f"--set=data.stages={32 * BEGIN}={annealing}:0.7,{tiny.data}:0.3;9e9={annealing}"
    other = f"--set=data.stages={32 * BEGIN}={annealing}"
    keep = ("--set=checkpoint.every=1", "--set=checkpoint.keep=9")
    ds = {n: tiny.ds(f"zero{n}", **zero(n)) for n in (2, 3)}

    def resume(run: str, step: int) -> tuple[object, ...]:
        return (*keep, "--resume", tiny.checkpoint(run, step))

    runs = [
        tiny.flags("whole", *keep, staged, ds=ds[2]),
        tiny.flags("without", *keep, ds=ds[2]),
        *(
            tiny.flags(f"at {step}", *resume("whole", step), staged, ds=ds[2])
            for step in (1, 2, 3, 5)
        ),
        tiny.flags("zero3", *resume("whole", 1), staged, ds=ds[3]),
        # a stage beyond the checkpoint may come, change and go
        tiny.flags("added", *resume("without", 2), staged, ds=ds[2]),
        tiny.flags("dropped", *resume("whole", 2), ds=ds[2]),
        tiny.flags("later", *resume("whole", 4), staged.partition(";")[0], ds=ds[2]),
        tiny.flags("late", *resume("whole", 3), ds=ds[2]),
        tiny.flags("late other", *resume("without", 3), other, ds=ds[2]),
    ]
    absent = tiny.path("absent")
    runs.append(tiny.flags("absent", f"--set=data.stages=9={tiny.data};10={absent}:1", ds=ds[2]))
    *outcomes, late, late_other, no_data = run_ranks(train_all, 2, runs, timeout_s=100)[0]
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes
    assert f"from sample {BEGIN} on: 0.7 {annealing}, 0.3 {tiny.data}" in outcomes[0].output
    whole, without = tiny.losses("whole"), tiny.losses("without")
    assert whole[:2] == without[:2] and whole[2] != without[2]
    for step in (1, 2, 3, 5):
        assert tiny.losses(f"at {step}") == whole[step:], step
    assert dict(tiny.losses("zero3")) == pytest.approx(dict(whole[1:]), rel=1e-6)
    assert tiny.losses("added") == whole[2:]
    assert tiny.losses("dropped") == without[2:]
    assert tiny.losses("later") == whole[4:]
    assert no_data.code == 2 and no_data.error == (
        f"data.stages {absent}: no data set there: make it with fgpt prepare --input TEXTS --out"
        f" {absent}"
    )
    assert late.code == late_other.code == 2
    assert "data.stages: checkpoint [[10, " in late.error and ", this run None;" in late.error
    assert "go on as before with the data.stages of before, let it differ with" in late.error
    assert "with --set data.stages=null, let it differ with --allow data" in late_other.error
