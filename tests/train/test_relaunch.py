"""`--resume none` in a start that torchrun or Slurm repeats: the run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.train.relaunch import FILE, describe_launch, restarted_by
from fgpt.utils.fault_injection import VARIABLE
from fgpt.utils.process import process_key
from tests.launched import Launch
from tests.ranks import run_ranks
from tests.tiny import EVERY, Tiny, train_all

JOB = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0"}


def started(path: Path, environ: dict[str, str]) -> str | None:
    """Who has restarted the run, to a start with this environment; it then owns the run."""
    launch = describe_launch(environ, torch.device("cpu"))
    answer = restarted_by(launch, path)
    (path / FILE).write_text(json.dumps(launch))
    return answer


@pytest.mark.usefixtures("one_rank")
def test_a_requeue_is_no_second_run_of_the_job(tmp_path: Path) -> None:
    assert started(tmp_path, JOB) is None  # no run there yet
    assert started(tmp_path, JOB) is None  # in an interactive job, srun twice
    assert started(tmp_path, JOB | {"SLURM_RESTART_COUNT": "1"}) == "Slurm"
    assert started(tmp_path, JOB | {"SLURM_RESTART_COUNT": "1", "SLURM_STEP_ID": "1"}) is None
    assert started(tmp_path, JOB | {"SLURM_RESTART_COUNT": "2"}) is None  # of another step
    assert started(tmp_path, JOB | {"SLURM_RESTART_COUNT": "3"}) == "Slurm"
    assert started(tmp_path, {**JOB, "SLURM_JOB_ID": "13", "SLURM_RESTART_COUNT": "4"}) is None
    assert started(tmp_path, {}) is None


@pytest.mark.usefixtures("one_rank")
def test_the_same_torchrun_is_a_restart(tmp_path: Path) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "none"}
    assert started(tmp_path, torchrun) is None
    assert started(tmp_path, torchrun) == "torchrun"
    assert started(tmp_path, {}) is None
    assert started(tmp_path, torchrun) is None


@pytest.mark.parametrize(
    "damaged", ["", "[]", "{}", '{"torchrun": 3}', '{"torchrun": [], "slurm": 7}', "[" * 9999]
)
@pytest.mark.usefixtures("one_rank")
def test_a_damaged_record_is_another_launch(tmp_path: Path, damaged: str) -> None:
    (tmp_path / FILE).write_text(damaged)
    assert started(tmp_path, JOB | {"SLURM_RESTART_COUNT": "1"}) is None


def test_process_keys_differ() -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    keys = [process_key(pid) for pid in (os.getpid(), other.pid, os.getpid())]
    other.communicate()
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.dist
@pytest.mark.timeout(240)
def test_torchrun_goes_on_with_the_run_that_it_began(tiny: Tiny) -> None:
    """An earlier run of the same name is moved aside once, by the first attempt."""
    assert run_ranks(train_all, 2, [tiny.flags("run")])[0][0].code == 0
    once = ["torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    # at the second checkpoint, which is complete by then: the fault does not occur again
    fault: dict[str, Any] = {VARIABLE: f"before_latest:0:{2 * EVERY}:kill"}
    with Launch(once, *tiny.flags("run"), env=fault) as launch:
        assert launch.wait(150) == 0, launch.output()
        said = launch.output()
    assert said.count("restarted by torchrun: --resume none was for the first start") == 1, said
    assert f"at step {2 * EVERY}" in said.partition("resuming from")[2].splitlines()[0]
    assert not tiny.path("run.2").exists()
    assert tiny.losses("run") == tiny.losses("run.1")
