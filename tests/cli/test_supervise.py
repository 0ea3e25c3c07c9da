"""`fgpt train`: what is the launcher, what are the run's flags, and what a restart changes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from fgpt.cli import main, supervise
from fgpt.cli.supervise import split_command, supervised_run
from fgpt.errors import UserError
from tests.tiny import Tiny

ARGUMENTS = argparse.Namespace(max_restarts=3, skip_bad_batches=1)
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", "launchers/train.py"]
DS = ["--ds_config", "ds_configs/zero2.json"]


def test_the_launcher_ends_with_the_script() -> None:
    for launcher in (
        TORCHRUN,
        ["deepspeed", "--num_gpus", "2", "launchers/train.py"],
        ["python", "launchers/train.py"],
        ["accelerate", "launch", "--config_file", "x.yaml", "/clone/launchers/train.py"],
    ):
        assert split_command([*launcher, *DS]) == (launcher, DS)
    with pytest.raises(UserError, match=r"fgpt train -- torchrun x: no launchers/train.py in it"):
        split_command(["torchrun", "x"])


@pytest.mark.parametrize(("gpus", "ranks"), [("0", "1"), ("4", "4")])
def test_flags_alone_run_under_torchrun(
    gpus: str, ranks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "COUNT_GPUS", f"print({gpus})")
    launcher, flags = split_command(DS)
    assert launcher[:3] == [sys.executable, "-m", "torch.distributed.run"] and flags == DS
    assert launcher[-3:-1] == ["--nproc-per-node", ranks] and Path(launcher[-1]).is_file()


def test_a_restart_replaces_resume() -> None:
    for written in (["--resume", "none"], ["--resume=runs/x"], []):
        run = supervised_run(TORCHRUN, [*written, *DS, "--steps", "9"], ARGUMENTS)
        assert run.command(False, []) == [*TORCHRUN, *written, *DS, "--steps", "9"]
        again = [*TORCHRUN, *DS, "--steps", "9", "--resume", "auto"]
        assert run.command(True, []) == again
        assert run.command(True, [(8, 9)]) == [*again, "--set=data.skip_samples=8-9"]
        assert (run.resumes, run.max_restarts, run.max_skipped_batches) == (False, 3, 1)
    assert supervised_run(TORCHRUN, [*DS, "--resume", "auto"], ARGUMENTS).resumes


def test_the_users_own_samples_stay_left_out() -> None:
    run = supervised_run(TORCHRUN, [*DS, "--set", "data.skip_samples=4-7,20-21"], ARGUMENTS)
    assert run.command(False, [(8, 9)])[-1] == "--set=data.skip_samples=4-9,20-21"


@pytest.mark.parametrize(
    ("flags", "run_dir"),
    [
        ([], "runs/tiny-zero2"),
        (["--model", "mini"], "runs/mini-zero2"),
        (["--run_dir", "a/b/"], "a/b"),
        (["--set", "run_dir=c"], "c"),
    ],
)
def test_the_run_directory(flags: list[str], run_dir: str) -> None:
    assert supervised_run(TORCHRUN, [*DS, *flags], ARGUMENTS).run_dir == Path(run_dir)


def test_a_directory_that_depends_on_weights() -> None:
    with pytest.raises(UserError, match="add --run_dir"):
        supervised_run(TORCHRUN, [*DS, "--init_from", "x"], ARGUMENTS)
    named = [*DS, "--init_from", "x", "--run_dir", "y"]
    assert supervised_run(TORCHRUN, named, ARGUMENTS).run_dir == Path("y")


def test_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train"])
    assert ended.value.code == 2 and "write -- and the launch command" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--max-restarts", "-1", "--", *TORCHRUN])
    assert "-1 is not a whole number from 0 to 10^9" in capsys.readouterr().err
    assert main(["train", "--", "torchrun", "x"]) == 2


def test_a_run_through_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wrong input of the run: one start, its exit code, and no traceback."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.py"
    script.write_text("import sys; print('started', *sys.argv[1:]); sys.exit(2)")
    assert main(["train", "--", sys.executable, str(script), "--ds_config", "x.json"]) == 2
    said = capfd.readouterr().out
    assert said.count("started --ds_config x.json") == 1
    assert "fgpt train: gave up, the input is wrong: failed after step 0, exit code 2" in said


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_flags_alone_train(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under torchrun, which ends with 1 for a wrong configuration: that is tried twice at most."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["train", "--", *tiny.flags("run", "--steps", 2)]) == 0
    assert tiny.checkpoint("run", 2).exists()
    assert "fgpt train: restarts: 0, steps lost: 0, goodput" in capfd.readouterr().out
    assert main(["train", "--", *tiny.flags("run", "--set=model.n_head=5")]) in (1, 2)
    assert "fgpt train: gave up, " in capfd.readouterr().out
