"""Under every launcher: signals, kills, exit codes, no orphans, the same losses.

What the shell sees is in fgpt/train/README.md; `EXIT` is that table.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.distributed import free_port, run_ranks, wait_until
from tests.launched import Launch
from tests.tiny import Tiny, train_all

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

GRACE_S = 30.0  # idle: 2 s; bounds are for a machine with other work
GONE_S = 30.0  # idle: under 5 s


def launcher(name: str, tiny: Tiny) -> list[str]:
    """The command before the script's name, for two ranks (python: one)."""
    port = str(free_port())
    if name == "accelerate":
        config = tiny.folder / "accelerate.yaml"
        config.write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\n"
            f"deepspeed_config:\n  deepspeed_config_file: {tiny.ds()}\n"
            f"num_machines: 1\nnum_processes: 2\nmain_process_port: {port}\n"
        )
        return ["accelerate", "launch", "--config_file", str(config)]
    return {
        "python": ["python"],
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", port],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", port],
    }[name]


def endless(name: str, tiny: Tiny) -> Launch:
    """A run that ends only by a signal, under way since a few steps."""
    flags = tiny.flags("run", "--steps", 1_000_000, "--set=train.log_every=1")
    launch = Launch(launcher(name, tiny), *flags, "--set=checkpoint.every=0")
    metrics = tiny.path("run") / "metrics.jsonl"

    def under_way() -> bool:
        assert launch.process.poll() is None, launch.output()
        return metrics.exists() and metrics.read_text().count('"loss"') > 3

    wait_until(under_way, 60, "the first steps")
    return launch


def nobody_left(launch: Launch, within_s: float) -> None:
    wait_until(lambda: not launch.descendants(), within_s, f"orphans end\n{launch.output()}")


def resumes_exactly(tiny: Tiny, ranks: int) -> None:
    """One checkpoint, of the last step taken; going on from there is as if nothing had happened."""
    step = tiny.losses("run")[-1][0]
    assert tiny.checkpoints("run") == ["latest", f"step_{step:08d}"]
    runs = [
        tiny.flags("run", "--resume", "auto", "--steps", step + 2),
        tiny.flags("reference", "--steps", step + 2),
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


@pytest.mark.parametrize("name", ["python", "torchrun", "deepspeed", "accelerate"])
def test_sigterm_to_the_launcher(tiny: Tiny, name: str) -> None:
    with endless(name, tiny) as launch:
        launch.process.terminate()
        code = launch.wait(GRACE_S)
        nobody_left(launch, GRACE_S)
        assert launch.output().count("stopped by a signal") == 1, launch.output()
    assert code == EXIT[name, "SIGTERM"], launch.output()
    resumes_exactly(tiny, 1 if name == "python" else 2)


@pytest.mark.parametrize("name", ["python", "torchrun", "deepspeed"])
def test_ctrl_c(tiny: Tiny, name: str) -> None:
    with endless(name, tiny) as launch:
        os.killpg(launch.process.pid, signal.SIGINT)  # as a terminal does
        code = launch.wait(GRACE_S)
        nobody_left(launch, GRACE_S)
        assert launch.output().count("stopped by a signal") == 1, launch.output()
    assert code == EXIT[name, "Ctrl-C"], launch.output()
    resumes_exactly(tiny, 1 if name == "python" else 2)


def deepspeed_launch_py(launch: Launch) -> int:
    """Process id of the parent of the ranks, which `deepspeed` starts."""
    return psutil.Process(launch.ranks()[0]).ppid()


@pytest.mark.parametrize("name", ["torchrun", "deepspeed", "deepspeed's launch.py"])
def test_kill_9_of_the_launcher(tiny: Tiny, name: str) -> None:
    with endless(name.partition("'")[0], tiny) as launch:
        pid = launch.process.pid if "'" not in name else deepspeed_launch_py(launch)
        os.kill(pid, signal.SIGKILL)
        nobody_left(launch, GONE_S)
        launch.wait(GRACE_S)
    resumes_exactly(tiny, 2)  # even then: the ranks took their leave in order


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_kill_9_of_a_rank(tiny: Tiny, name: str) -> None:
    with endless(name, tiny) as launch:
        os.kill(launch.ranks()[1], signal.SIGKILL)
        code = launch.wait(GRACE_S)
        nobody_left(launch, GRACE_S)
    # deepspeed looks once a second, and reports the killed rank (-9) or the one that noticed (1)
    assert code == 1 or (name, code) == ("deepspeed", 256 - signal.SIGKILL)
    assert launch.output().count("fgpt: after step") == 1, launch.output()
    assert "this is a bug" not in launch.output()


BAD = '{"train_micro_batch_size_per_gpu": 8, "gradient_clipp1ng": 1.0, "optimizer": {'


@pytest.mark.parametrize("name", ["python", "torchrun", "deepspeed"])
def test_a_bad_json(tiny: Tiny, tmp_path: Path, name: str) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(BAD)
    with Launch(launcher(name, tiny), *tiny.flags("run", ds=bad)) as launch:
        code = launch.wait(60)
        nobody_left(launch, GONE_S)
    assert code == EXIT[name, "bad JSON"], launch.output()
    assert launch.output().count("fgpt: configuration: 1 fault") == 1
    assert f"{bad}" in launch.output()
    assert not ours(launch.output().splitlines())
    assert not tiny.path("run").exists()


def ours(lines: Sequence[str]) -> list[str]:
    """Lines of tracebacks through our files."""
    return [line for line in lines if 'File "' in line and "fgpt" in line]
