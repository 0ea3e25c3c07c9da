"""Startup: locks, ports, inconsistent worlds, errors before the first step."""

from __future__ import annotations

import json
import os
import signal
import socket
from datetime import timedelta

import pytest

from fgpt.distributed import launch
from fgpt.distributed.launch import World
from fgpt.train import run_dir
from tests.ranks import run_ranks, start_ranks, start_trainer, wait_until
from tests.tiny import Outcome, Tiny, train_all

pytestmark = pytest.mark.dist


def test_two_runs_in_one_directory(tiny: Tiny) -> None:
    flags = tiny.flags("run", "--steps", 1_000_000, "--set=train.log_every=1")
    metrics = tiny.path("run") / "metrics.jsonl"
    with start_trainer(2, *flags) as first:
        wait_until(lambda: metrics.exists() and metrics.stat().st_size > 1000, 60, "steps")
        for outcome in run_ranks(train_all, 2, [flags, [*flags, "--resume", "auto"]]):
            for second in outcome:
                assert second.code == 2 and f"process {first.pids[0]}" in second.error
        assert first.processes[0].is_alive()
        os.kill(first.pids[0], signal.SIGKILL)
        first.kill()
    # the lock of a dead process is released
    flags = tiny.flags("run", "--steps", 3, "--resume", "none")
    assert run_ranks(train_all, 2, [flags])[0][0].code == 0
    assert (tiny.folder / "run.1" / "metrics.jsonl").exists()


def test_without_resume_an_earlier_run_is_kept_aside(tiny: Tiny) -> None:
    flags = tiny.flags("run", "--steps", 2)
    first, second, third = run_ranks(train_all, 2, [flags] * 3)[0]
    assert first.code == second.code == third.code == 0
    assert "moved to" not in first.output
    assert f"moved to {tiny.folder / 'run.2'}" in third.output
    assert tiny.losses("run") == tiny.losses("run.1") == tiny.losses("run.2")


def test_the_port_is_taken(tiny: Tiny) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        # rank 0 alone, which would listen
        env = {"MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        with start_trainer(1, *tiny.flags("run"), env=env) as ranks:
            assert ranks.wait(30) == [2]
            said = ranks.output(0)
    assert f"127.0.0.1:{port}" in said and "--master_port" in said, said
    assert "Traceback" not in said


def test_a_rank_that_never_comes() -> None:
    env = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    with start_ranks(_meet_in_two_seconds, 2, env=env, join=False) as ranks:
        assert ranks.wait(30) == [0, 0], ranks.output()
        for text in ranks.results():
            assert "of 3 could not meet the others" in text and "all of them started" in text


def _meet_in_two_seconds(world: World) -> str:
    launch.START_TIMEOUT = timedelta(seconds=2)
    try:
        launch.init_process_group(world, os.environ)
    except launch.LaunchError as error:
        return str(error)
    return "they met"


def test_nodes_that_do_not_share_the_run_directory(tiny: Tiny) -> None:
    for node in "01":
        (tiny.folder / node).mkdir()
    flags = ["--run_dir", "run", "--steps", "2"]
    outcomes = run_ranks(_train_on_two_nodes, 2, str(tiny.folder), tiny.flags("run", *flags))
    for apart, together in outcomes:
        assert apart.code == 2 and "run: is not rank 0's directory: name one" in apart.error
        assert together.code == 0, together
    assert [path.name for path in (tiny.folder / "0" / "run").iterdir()] == ["lock"]
    assert not (tiny.folder / "1" / "run").exists()
    assert not list((tiny.folder / "run").glob(".fgpt*"))


def _train_on_two_nodes(world: World, folder: str, flags: list[str]) -> list[Outcome]:
    run_dir.SHARED_FILE_S = 0.5
    node = World(world.rank, world.size, local_rank=0, local_size=1)
    outcomes = []
    for directory in (f"{folder}/{world.rank}", folder):
        os.chdir(directory)
        outcomes += train_all(node, [flags])
    return outcomes


def test_nodes_with_different_files(tiny: Tiny) -> None:
    outcomes = run_ranks(_train_with_own_steps, 2, tiny.flags("run"))
    assert [code for code, _ in outcomes] == [2, 2]
    assert all("the configuration differs: rank 1: " in text for _, text in outcomes)
    assert not tiny.path("run").exists()


def _train_with_own_steps(world: World, flags: list[str]) -> tuple[int, str]:
    outcome = train_all(world, [[*flags, "--steps", str(world.rank + 1)]])[0]
    return outcome.code, outcome.error


def test_accelerate_that_counts_one(tiny: Tiny) -> None:
    """Two ranks that accelerate would train alone (issue 2, item 6)."""
    results = run_ranks(_accelerate_alone, 2, tiny.flags("run"))
    assert all("accelerate counts 1 processes, but 2 run" in text for text in results)


def _accelerate_alone(world: World, flags: list[str]) -> str:
    import accelerate

    from fgpt.config.resolve import resolve
    from fgpt.engine.build import build_engine
    from fgpt.errors import LaunchError
    from tests.run_flags import parse_run_flags

    accelerate.Accelerator.num_processes = property(lambda self: 1)  # type: ignore[assignment]
    resolved = resolve(parse_run_flags(flags), world=2, device="cpu")
    try:
        import torch

        build_engine(resolved, world, torch.device("cpu"), accelerate=True)
    except LaunchError as error:
        return str(error)
    return "trained"


def test_data_with_more_ids_than_the_model(tiny: Tiny) -> None:
    outcome = run_ranks(train_all, 2, [[*tiny.flags("run"), "--set=model.vocab_size=300"]])[0][0]
    assert outcome.code == 2 and "400 ids" in outcome.error and "300 rows" in outcome.error


def test_the_resolved_configuration_is_beside_the_run(tiny: Tiny) -> None:
    assert run_ranks(train_all, 1, [tiny.flags("run", "--steps", 1)])[0][0].code == 0
    config = json.loads((tiny.path("run") / "config.json").read_text())
    assert config["run"]["train"]["steps"] == 1
    assert config["origins"]["run.train.steps"] == "flag --steps"
