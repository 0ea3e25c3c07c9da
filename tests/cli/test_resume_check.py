"""`fgpt resume-check` as a user calls it; which layouts it chooses; wrong input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fgpt.cli import main
from fgpt.cli.resume_check import _parser, _resume_check
from fgpt.parity.resume_layouts import ResumeCheck
from tests.parity.resuming import flags
from tests.prepare.corpora import tree
from tests.ranks import ROOT


def check_of(folder: Path, data: Path, *more: str) -> ResumeCheck:
    return _resume_check(_parser().parse_args(flags(folder, data, *more)), "cpu")


def names(check: ResumeCheck) -> list[str]:
    return [target.name for target in check.targets]


def test_the_usual_layouts(small_data: Path, tmp_path: Path) -> None:
    two = check_of(tmp_path, small_data)
    assert (two.steps, two.at) == (6, 3)
    assert names(two) == ["same", "half", "zero3", "tp2", "pp2zero1"] and not two.refused
    one = check_of(tmp_path, small_data, "--world", "1", "--ds_set", "zero_optimization.stage=3")
    assert names(one) == ["same", "double", "zero1", "tp2", "pp2zero1"]


def test_all_layouts_of_a_pipeline(small_data: Path, tmp_path: Path) -> None:
    pipe = ("--pp", "2", "--ds_set", "zero_optimization.stage=1", "--layouts", "all")
    check = check_of(tmp_path, small_data, *pipe)
    assert names(check) == ["same", "pp2zero0", "tp2", "cp2", "double", "plain"]
    assert "stage 3 with pp 2" in check.refused["zero3"]
    assert check.refused["pp2"] == "the configuration's own layout"
    assert "world 1 is not a multiple of tp 1 x pp 2" in check.refused["half"]
    for target in check.targets:
        batch = target.resolved.batch
        assert batch.global_size == 2 and batch.world <= 4, target.name


def test_a_batch_that_ranks_do_not_divide(small_data: Path, tmp_path: Path) -> None:
    check = check_of(tmp_path, small_data, "--world", "1", "--micro_batch", "3")
    assert names(check) == ["same", "zero3", "tp2", "pp2zero1"]
    assert "train_batch_size 3 is not" in check.refused["double"]


def test_only_the_number_of_steps_is_cut(small_data: Path, tmp_path: Path) -> None:
    """--steps is the check's; the schedule stays that of the run, and monitors stay off."""
    more = ("--set", "train.steps=50", "--steps", "4", "--ds_set", "csv_monitor.enabled=true")
    check = check_of(tmp_path, small_data, *more)
    assert check.steps == 4 and check.same.resolved.run.train.steps == 50
    assert not check.same.resolved.settings.monitors


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--steps", "1"), "--steps 1: must be at least 2"),
        (("--at", "6"), "--at 6: must be at least 1, and below --steps 6"),
        (("--layouts", "nonsense"), "'nonsense' is not a layout at 'nonsense'"),
        (
            ("--layouts", "pp2zero3"),
            "--layouts pp2zero3: zero_optimization.stage: stage 3 with pp 2",
        ),
        (("--layouts", "half", "--world", "1"), "--layouts half: 1 rank cannot be halved"),
        (("--layouts", "tp8"), "--layouts tp8: needs 8 ranks, at most 4"),
        (("--set", "data.seq_len=100000"), "data.seq_len"),
        (("--data", "absent"), "absent: not a prepared data set"),
        (("--keep", str(ROOT)), "is not empty; name a new directory"),
    ],
)
def test_wrong_input_is_one_line_before_there_are_ranks(
    more: tuple[str, ...],
    says: str,
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the verb's own choice would stay
    monkeypatch.delenv("RANK", raising=False)
    data = flags(tmp_path, small_data)
    if "--data" in more:  # or it is said to be given twice
        del data[data.index("--data") : data.index("--data") + 2]
    assert main(["resume-check", *data, *more]) == 2
    out, error = capsys.readouterr()
    assert says in error and "Traceback" not in error and out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["ds.json"]


def test_under_a_launcher_it_is_refused(
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main(["resume-check", *flags(tmp_path, small_data)]) == 2
    assert "call it without a launcher" in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_the_table(small_data: Path, tmp_path: Path) -> None:
    """The run directories go, and the data set stays as it is."""
    before, temporary = tree(small_data), tmp_path / "temporary"
    temporary.mkdir()
    more = ("--world", "1", "--layouts", "zero3", "--steps", "3")
    command = [
        sys.executable,
        "-m",
        "fgpt.cli",
        "resume-check",
        *flags(tmp_path, small_data, *more),
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert "2 layouts: the same run" in done.stdout and "Traceback" not in done.stderr
    assert "bounds: same: equal in every bit; other layouts: losses 2e-06" in done.stdout
    assert list(temporary.iterdir()) == [] and tree(small_data) == before
