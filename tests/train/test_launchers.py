"""Under every launcher: signals, kills, exit codes, no orphans, the same losses.

`EXIT` is the table of exit codes in fgpt/train/README.md.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.launched import Launch
from tests.ranks import TIMEOUT_S, free_port, run_ranks, wait_until
from tests.tiny import Tiny, train_all

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]

GRID = ("--tp=2", "--pp=2")
GRACE_S = 30.0  # 2 s on an idle machine
GONE_S = 30.0  # under 5 s on an idle machine


def launcher(name: str, tiny: Tiny, ranks: int = 2) -> list[str]:
    """Return the command before the script's name (python: one rank)."""
    port, n = str(free_port()), str(ranks)
    if name == "accelerate":
        config = tiny.folder / "accelerate.yaml"
        config.write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\n"
            f"deepspeed_config:\n  deepspeed_config_file: {tiny.ds()}\n"
            f"num_machines: 1\nnum_processes: {n}\nmain_process_port: {port}\n"
        )
        return ["accelerate", "launch", "--config_file", str(config)]
    return {
        "python": ["python"],
        "torchrun": ["torchrun", "--nproc-per-node", n, "--master-port", port],
        "deepspeed": ["deepspeed", "--num_gpus", n, "--master_port", port],
    }[name]


def endless(name: str, tiny: Tiny, grid: Sequence[str] = ()) -> Launch:
    """Start a run that only a signal ends, and wait for a few steps."""
    ds = tiny.ds(zero_optimization={"stage": 1}) if grid else None
    flags = tiny.flags("run", *grid, "--steps", 1_000_000, "--set=train.log_every=1", ds=ds)
    command = launcher(name, tiny, 4 if grid else 2)
    launch = Launch(command, *flags, "--set=checkpoint.every=0")
    metrics = tiny.path("run") / "metrics.jsonl"

    def under_way() -> bool:
        assert launch.process.poll() is None, launch.output()
        return metrics.exists() and metrics.read_text().count('"loss"') > 3

    try:
        wait_until(under_way, TIMEOUT_S, "the first steps")
    except AssertionError:
        launch.kill()
        raise
    return launch


def nobody_left(launch: Launch, within_s: float) -> None:
    launch.wait_until_gone(within_s)


def resumes_exactly(tiny: Tiny, ranks: int, grid: Sequence[str] = ()) -> None:
    """One checkpoint, of the last step; the resumed run equals the uninterrupted one."""
    step = tiny.losses("run")[-1][0]
    assert tiny.checkpoints("run") == ["latest", f"step_{step:08d}"]
    ds = tiny.ds(zero_optimization={"stage": 1}) if grid else None
    runs = [
        tiny.flags("run", *grid, "--resume", "auto", "--steps", step + 2, ds=ds),
        tiny.flags("reference", *grid, "--steps", step + 2, ds=ds),
    ]
    assert [o.code for o in run_ranks(train_all, ranks, runs)[0]] == [0, 0]
    assert tiny.losses("run") == tiny.losses("reference")


EXIT = {
    # (launcher, what): its exit code
    ("python", "SIGTERM"): 143,
    ("torchrun", "SIGTERM"): 1,
    ("deepspeed", "SIGTERM"): -signal.SIGTERM,
    ("accelerate", "SIGTERM"): 1,
    ("python", "Ctrl-C"): 130,
    ("torchrun", "Ctrl-C"): 1,
    ("deepspeed", "Ctrl-C"): -signal.SIGINT,
    ("python", "bad JSON"): 2,
    ("torchrun", "bad JSON"): 1,
    ("deepspeed", "bad JSON"): 2,
}


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        *((name, ()) for name in ("python", "torchrun", "deepspeed")),
        pytest.param("accelerate", (), marks=pytest.mark.slow),  # it runs torchrun's agent
        pytest.param("torchrun", GRID, marks=pytest.mark.slow),
        pytest.param(
            "deepspeed", GRID, marks=pytest.mark.slow
        ),  # test_stop_signals.py signals the ranks
    ],
)
def test_sigterm_to_the_launcher(tiny: Tiny, name: str, grid: Sequence[str]) -> None:
    with endless(name, tiny, grid) as launch:
        launch.process.terminate()
        code = launch.wait(GRACE_S)
        nobody_left(launch, GRACE_S)
        assert launch.output().count("stopped by a signal") == 1, launch.output()
    assert code == EXIT[name, "SIGTERM"], launch.output()
    resumes_exactly(tiny, 4 if grid else 1 if name == "python" else 2, grid)


@pytest.mark.parametrize(
    "name", ["python", "torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)]
)
def test_ctrl_c(tiny: Tiny, name: str) -> None:
    with endless(name, tiny) as launch:
        os.killpg(launch.process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        code = launch.wait(GRACE_S)
        nobody_left(launch, GRACE_S)
        assert launch.output().count("stopped by a signal") == 1, launch.output()
    # deepspeed's two processes get the signal, too: the ranks' code shows if they end first
    also = {1} if name == "deepspeed" else set()
    assert code in {EXIT[name, "Ctrl-C"], *also}, launch.output()
    resumes_exactly(tiny, 1 if name == "python" else 2)


def deepspeed_launch_py(launch: Launch) -> int:
    """Return the process id of launch.py, the parent of the ranks under `deepspeed`."""
    return psutil.Process(launch.ranks()[0]).ppid()


@pytest.mark.parametrize(
    "name",
    [
        "torchrun",
        pytest.param("deepspeed", marks=pytest.mark.slow),  # its launch.py: here
        "deepspeed's launch.py",
        pytest.param("accelerate", marks=pytest.mark.slow),  # it runs torchrun's agent
    ],
)
def test_kill_9_of_the_launcher(tiny: Tiny, name: str) -> None:
    with endless(name.partition("'")[0], tiny) as launch:
        pid = launch.process.pid if "'" not in name else deepspeed_launch_py(launch)
        os.kill(pid, signal.SIGKILL)
        nobody_left(launch, GONE_S)
        launch.wait(GRACE_S)
    resumes_exactly(tiny, 2)  # the ranks still saved and exited


@pytest.mark.parametrize(
    ("name", "grid", "rank"),
    [
        ("torchrun", (), 1),
        pytest.param("deepspeed", (), 1, marks=pytest.mark.slow),  # in a grid: here
        pytest.param("torchrun", GRID, 2, marks=pytest.mark.slow),
        ("deepspeed", GRID, 3),
    ],
)
def test_kill_9_of_a_rank(tiny: Tiny, name: str, grid: Sequence[str], rank: int) -> None:
    with endless(name, tiny, grid) as launch:
        os.kill(launch.ranks()[rank], signal.SIGKILL)
        code = launch.wait(GRACE_S)
        nobody_left(launch, GRACE_S)
    # deepspeed looks once a second, and reports the killed rank (-9) or the one that noticed (1)
    assert code == 1 or (name, code) == ("deepspeed", 256 - signal.SIGKILL)
    assert launch.output().count("fgpt: after step") == 1, launch.output()
    assert "this is a bug" not in launch.output()
    assert not ours(launch.output().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("action", ["error", "exit", "kill", "segv"])
@pytest.mark.parametrize("name", ["torchrun", "deepspeed", "accelerate"])
def test_the_end_of_a_rank_is_the_launchers_failure(tiny: Tiny, name: str, action: str) -> None:
    fault = {"FGPT_FAULT": f"forward:1:3:{action}"}
    with Launch(launcher(name, tiny), *tiny.flags("run"), env=fault) as launch:
        code = launch.wait()
        nobody_left(launch, GONE_S)
    # torchrun has one code for all; deepspeed passes on that of the rank that it sees first
    own = {"error": 70, "exit": 3, "kill": 256 - signal.SIGKILL, "segv": 256 - signal.SIGSEGV}
    assert code == 1 or (name, code) == ("deepspeed", own[action]), launch.output()
    lines = launch.output().splitlines()
    assert lines.count("RuntimeError: injected fault at forward") == (action == "error")
    assert launch.output().count("fgpt: after step 3: ") == 1, launch.output()


BAD = '{"train_micro_batch_size_per_gpu": 8, "gradient_clipp1ng": 1.0, "optimizer": {'


@pytest.mark.parametrize(
    "name",
    # another fault under deepspeed: test_grid_start.py
    ["python", "torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)],
)
def test_a_bad_json(tiny: Tiny, tmp_path: Path, name: str) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(BAD)
    with Launch(launcher(name, tiny), *tiny.flags("run", ds=bad)) as launch:
        code = launch.wait(60)
        nobody_left(launch, GONE_S)
    assert code == EXIT[name, "bad JSON"], launch.output()
    assert launch.output().count("fgpt: configuration: 1 error") == 1
    assert f"{bad}" in launch.output()
    assert not ours(launch.output().splitlines())
    assert not tiny.path("run").exists()


def ours(lines: Sequence[str]) -> list[str]:
    """Return traceback lines that name our files."""
    return [line for line in lines if 'File "' in line and "fgpt" in line]


@pytest.mark.slow  # test_relaunch.py has another restart
def test_torchrun_restarts_a_killed_rank(tiny: Tiny) -> None:
    """The ranks of the second attempt meet, although torchrun keeps the store of the first."""
    flags = tiny.flags("run", "--resume", "auto", "--steps", 150, "--set=train.log_every=1")
    once = ["torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    newest = tiny.path("run") / "checkpoints" / "latest"
    with Launch(once, *flags, "--set=checkpoint.every=20") as launch:
        wait_until(newest.exists, TIMEOUT_S, "a checkpoint")
        os.kill(launch.ranks()[1], signal.SIGKILL)
        assert launch.wait(120) == 0, launch.output()
        said = launch.output()
    assert "resuming from" in said and "Traceback" not in said, said
    assert [step for step, _ in tiny.losses("run")] == list(range(1, 151))
    nobody_left(launch, GONE_S)
