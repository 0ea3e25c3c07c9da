"""The ranks of a scenario: what they answer, how they fail, and where their time and memory go."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from fgpt.bench.job import Job
from fgpt.bench.ranks.memory import Memory
from fgpt.bench.ranks.shares import Doors
from fgpt.bench.ranks.worker import FIRST_STEPS
from fgpt.bench.worker_group import (
    RemoteWorkerGroup,
    WorkerGroup,
    WorkerGroupFailed,
    reason,
    slots_of,
)
from fgpt.errors import UserError
from fgpt.parallel.topology import Grid
from fgpt.plan.traffic import sent_bytes
from tests.ranks import run_ranks, wait_until

JOB = Job("seed-1m", "zero1", "fp32", 2, 1, 32, {}, "fgpt", 1)


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_two_ranks_answer():
    job = replace(JOB, ranks=2)
    with WorkerGroup(job) as team:
        team.here()
        team.ready()
        first = team.first
        assert len(first["losses"]) == FIRST_STEPS and first["losses"][-1] < first["losses"][0]
        assert len(first["memory"]["per_rank_bytes"]) == 2
        assert first["config"]["batch"]["global_size"] == 4
        assert team.ask("train")["round_s"] > 0
        assert team.ask("predict")["round_s"] > 0
        answer = team.ask("shares")
    assert sum(answer["shares"].values()) == pytest.approx(1)
    assert 0 < answer["shares"]["communication"] < 1
    resolved = job.resolved("cpu")
    predicted = sent_bytes(resolved, Grid.of(resolved.batch).coordinates(0))
    assert answer["sent_bytes"]["data"] == predicted["data"]


@pytest.mark.timeout(120)
def test_what_is_wrong_is_said_in_one_line():
    with WorkerGroup(replace(JOB, sets={"model.n_kv_head": 3})) as team:
        with pytest.raises(WorkerGroupFailed, match="n_kv_head") as error:
            team.here()
            team.ready()
        assert "\n" not in str(error.value)
    with WorkerGroup(JOB) as team:
        team.here()
        team.ready()
        os.kill(team.ranks[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerGroupFailed, match="killed"):
            team.ask("train")


@pytest.mark.timeout(120)
def test_ranks_end_with_their_team():
    with WorkerGroup(replace(JOB, ranks=2)) as team:
        pids = [rank.pid for rank in team.ranks]
        raised = pytest.raises(KeyboardInterrupt)
        with raised, team:
            raise KeyboardInterrupt
        assert all(rank.poll() is not None for rank in team.ranks)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.dist
@pytest.mark.timeout(170)
def test_a_hostfile(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two of them\nlocalhost slots=2\n")
    with RemoteWorkerGroup(replace(JOB, ranks=2), hosts, tmp_path) as team:
        team.here()
        team.ready()
        assert len(team.first["memory"]["per_rank_bytes"]) == 2
        assert team.ask("train")["round_s"] > 0
        assert team.ask("shares")["shares"]["compute"] > 0  # though rounds are left
        with pytest.raises(WorkerGroupFailed, match="trace"):
            team.ask("trace", file="x")
    with pytest.raises(WorkerGroupFailed, match="4 ranks, 2 slots"):
        RemoteWorkerGroup(replace(JOB, ranks=4), hosts, tmp_path)


def ranks_of(job: Path) -> list[int]:
    """Processes that were given this file."""
    found = psutil.process_iter(["pid", "cmdline"])
    return [p.pid for p in found if str(job) in (p.info["cmdline"] or ())]


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_ranks_of_a_hostfile_end_with_their_team(tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    job = tmp_path / "job.json"
    with RemoteWorkerGroup(replace(JOB, ranks=2), tmp_path / "hosts", tmp_path) as team:
        wait_until(lambda: len(ranks_of(job)) >= 4, 60, "launchers and two ranks")
        raised = pytest.raises(KeyboardInterrupt)
        with raised, team:
            raise KeyboardInterrupt
        wait_until(lambda: not ranks_of(job), 30, "all are gone")


@pytest.mark.parametrize("text", ["", "localhost slots=0\n", "localhost\n", "# a slots=2\n"])
def test_a_hostfile_without_slots(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match="no slots"):
        slots_of(tmp_path / "hosts")


def test_reasons():
    assert reason("a\ntorch.OutOfMemoryError: CUDA out of memory. Tried\nb") == "out of memory"
    assert reason("Traceback\n\nValueError: no\n\n") == "ValueError: no"
    assert reason(" \n") is None


def test_peak_memory_is_of_what_came_after():
    before = torch.ones(64, 2**20)  # 256 MiB that do not count
    memory = Memory(torch.device("cpu"))
    during = torch.ones(32, 2**20)
    del during
    peak = memory.peak()
    assert 120 * 2**20 < peak.peak_bytes < 200 * 2**20
    assert before.sum() > 0


def late(world):
    """Rank 1 comes half a second late to a sum, and sends half a second late."""
    with Doors() as doors:
        if world.rank == 1:
            time.sleep(0.5)
        dist.all_reduce(torch.ones(8))
        between = doors.seconds["communication"]
        if world.rank == 1:
            time.sleep(0.5)
            dist.send(torch.ones(8), 0)
        else:
            dist.recv(torch.ones(8), 1)
    wait = dist.Work.wait
    return between, doors.seconds["pipeline"], wait is doors._wait


@pytest.mark.dist
def test_time_at_the_doors():
    (sum_0, pipe_0, restored), (sum_1, pipe_1, _) = run_ranks(late, 2)
    assert sum_0 > 0.4 and pipe_0 > 0.4 and restored
    assert sum_1 < sum_0 and pipe_1 < pipe_0
