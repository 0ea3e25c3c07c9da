"""Impossible grids: one report before anything starts, from `fgpt check` and the trainer."""

from __future__ import annotations

import pytest

from fgpt.cli import main
from tests.launched import Launch
from tests.ranks import start_trainer
from tests.tiny import Tiny
from tests.train.test_launchers import GONE_S, launcher, nobody_left

# processes, flags, DeepSpeed's ZeRO stage, what is said
IMPOSSIBLE = {
    "tp of 3": (3, ("--tp=2",), 2, "world 3 is not a multiple of tp 2 x pp 1 x cp 1 = 2"),
    "cp of 2": (2, ("--cp=3",), 2, "world 2 is not a multiple of tp 1 x pp 1 x cp 3 = 3"),
    "tp x pp of 2": (2, ("--tp=2", "--pp=2"), 1, "world 2 is not a multiple of tp 2 x pp 2"),
    "stages": (9, ("--pp=9",), 1, "9 stages for n_layer 2"),
    "heads": (4, ("--tp=4",), 2, "2 is not a multiple of tp 4"),
    "stage 2": (2, ("--pp=2",), 2, "zero_optimization.stage"),
    "sequence": (2, ("--sequence",), 2, "parallel.sequence"),
    "zero": (2, ("--tp=0",), 2, "--tp (parallel.tp): 0 is wrong"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_check_says_it(tiny: Tiny, capsys: pytest.CaptureFixture[str], name: str) -> None:
    world, grid, stage, said = IMPOSSIBLE[name]
    flags = tiny.flags("run", *grid, ds=tiny.ds(zero_optimization={"stage": stage}))
    assert main(["check", *flags, "--world", str(world), "--device", "cpu"]) == 2
    report = capsys.readouterr().err
    assert report.count("fgpt: configuration: ") == 1 and said in report, report


@pytest.mark.dist
@pytest.mark.parametrize("name", ["tp of 3", "cp of 2", "stage 2"])
def test_the_trainer_says_the_same(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    world, grid, stage, said = IMPOSSIBLE[name]
    flags = tiny.flags("run", *grid, ds=tiny.ds(zero_optimization={"stage": stage}))
    main(["check", *flags, "--world", str(world), "--device", "cpu"])
    with start_trainer(world, *flags) as ranks:
        ranks.processes[0].join(60)
        assert ranks.processes[0].exitcode == 2
        assert ranks.output(0) == capsys.readouterr().err
        assert not any(ranks.output(rank) for rank in range(1, world))
    assert said and not tiny.path("run").exists()


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_deepspeed_ends_with_the_report(tiny: Tiny) -> None:
    with Launch(launcher("deepspeed", tiny, 3), *tiny.flags("run", "--tp=2")) as launch:
        assert launch.wait() == 2, launch.output()
        nobody_left(launch, GONE_S)
    assert launch.output().count("world 3 is not a multiple of tp 2") == 1, launch.output()
    assert "Traceback" not in launch.output()


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_accelerate_knows_no_grid(tiny: Tiny) -> None:
    with Launch(launcher("accelerate", tiny), *tiny.flags("run", "--tp=2")) as launch:
        assert launch.wait() == 1, launch.output()
        nobody_left(launch, GONE_S)
    said = "fgpt: accelerate launch supports data-parallel ranks only, and this run has world 2"
    assert launch.output().count(said) == 1, launch.output()
    assert not tiny.path("run").exists()
