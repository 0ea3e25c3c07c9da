"""A run that fails to start changes nothing, and refuses a directory with other contents."""

from __future__ import annotations

import pytest

from fgpt.data.card import CARD_NAME
from tests.ranks import run_ranks
from tests.tiny import EVERY, STEPS, Tiny, train_all


@pytest.mark.dist
def test_a_run_that_cannot_start_leaves_the_earlier_one(tiny: Tiny) -> None:
    home = tiny.folder / "home"
    home.mkdir()
    (home / "precious.txt").write_text("mine")
    good, too_long, foreign, again, further = run_ranks(
        train_all,
        1,
        [
            tiny.flags("good"),
            # the validation split is too short for one sample
            tiny.flags("good", "--set=model.max_seq_len=100000", "--set=data.seq_len=100000"),
            tiny.flags("home"),
            tiny.flags("good", "--resume", "auto", "--steps", EVERY),
            tiny.flags("good", "--resume", "auto", "--steps", STEPS + EVERY),
        ],
        timeout_s=80,
    )[0]
    assert good.code == again.code == further.code == 0
    assert too_long.code == 2 and "seq_len 100000 needs" in too_long.error
    assert foreign.code == 2 and "contains 'precious.txt' and is no run directory" in foreign.error
    assert [path.name for path in home.iterdir()] == ["precious.txt"]
    assert not tiny.path("good.1").exists()
    assert f"already at step {STEPS} of {EVERY}: raise --steps" in again.output
    assert f"at step {STEPS}" in further.output
    assert [step for step, _ in tiny.losses("good")] == list(range(1, STEPS + EVERY + 1))


@pytest.mark.dist
def test_a_wrong_data_path_is_named_with_what_was_meant(tiny: Tiny) -> None:
    (tiny.folder / "text").touch()
    for end in ("bin", "idx"):
        (tiny.folder / f"megatron.{end}").touch()
    wrong = {
        f"{tiny.data}/train": f"is a file of the data set {tiny.data}: name the directory",
        f"{tiny.data}/valid.idx:1,x:2": f"is a file of the data set {tiny.data}",
        f"{tiny.data}/{CARD_NAME}": f"is a file of the data set {tiny.data}",
        f"{tiny.data}s": f"did you mean {tiny.data}?",
        f"{tiny.folder}/megatron": f"fgpt data import --train {tiny.folder}/megatron --tokenizer",
        f"{tiny.folder}/nothing": "no data set there, and data.recipe nowhere.json, by which",
        f"{tiny.folder}/text": "no data set there, and data.recipe nowhere.json, by which",
    }
    runs = [
        tiny.flags("run", "--data", path, "--set=data.recipe=nowhere.json")
        for path in (*wrong, f"{tiny.data}/")
    ]
    # the default recipe is not for a path that the user typed
    runs.append(tiny.flags("run", "--data", f"{tiny.folder}/nothing"))
    loop = tiny.folder / "loop"
    loop.symlink_to(loop)
    runs.append(tiny.flags("run", "--resume", loop))
    *outcomes, right, without_recipe, looping = run_ranks(train_all, 1, runs)[0]
    assert looping.code == 2 and f"--resume {loop}: " in looping.error
    assert right.code == 0, right
    assert without_recipe.code == 2
    assert f"fgpt prepare --input TEXTS --out {tiny.folder}/nothing" in without_recipe.error
    assert not (tiny.folder / "nothing").exists()
    for (path, expected), outcome in zip(wrong.items(), outcomes, strict=True):
        typed = path.partition(":")[0]
        assert outcome.code == 2 and f"data.path {typed}: " in outcome.error, outcome
        assert expected in outcome.error
