"""The ranks of a scenario: replies, failures, time breakdown and peak memory."""

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
from fgpt.bench.time_breakdown import CollectiveTimer
from fgpt.bench.worker import WARMUP_STEPS, PeakMemory
from fgpt.bench.worker_group import (
    RemoteWorkerGroup,
    WorkerGroup,
    WorkerGroupFailed,
    failure_cause,
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
    with WorkerGroup(job) as group:
        group.wait_until_started()
        group.run_warmup()
        warmup = group.warmup
        assert len(warmup["losses"]) == WARMUP_STEPS and warmup["losses"][-1] < warmup["losses"][0]
        assert len(warmup["memory"]["per_rank_bytes"]) == 2
        assert warmup["config"]["batch"]["global_size"] == 4
        assert group.request("train")["round_s"] > 0
        assert group.request("predict")["round_s"] > 0
        answer = group.request("breakdown")
    assert sum(answer["shares"].values()) == pytest.approx(1)
    assert 0 < answer["shares"]["communication"] < 1
    resolved = job.resolved("cpu")
    predicted = sent_bytes(resolved, Grid.of(resolved.batch).coordinates(0))
    assert answer["sent_bytes"]["data"] == predicted["data"]


@pytest.mark.timeout(120)
def test_failures_are_reported_in_one_line():
    with WorkerGroup(replace(JOB, overrides={"model.n_kv_head": 3})) as group:
        with pytest.raises(WorkerGroupFailed, match="n_kv_head") as error:
            group.wait_until_started()
            group.run_warmup()
        assert "\n" not in str(error.value)
    with WorkerGroup(JOB) as group:
        group.wait_until_started()
        group.run_warmup()
        os.kill(group.processes[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerGroupFailed, match="killed"):
            group.request("train")


@pytest.mark.timeout(120)
def test_ranks_end_with_their_group():
    with WorkerGroup(replace(JOB, ranks=2)) as group:
        pids = [rank.pid for rank in group.processes]
        raised = pytest.raises(KeyboardInterrupt)
        with raised, group:
            raise KeyboardInterrupt
        assert all(rank.poll() is not None for rank in group.processes)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(170)
def test_a_hostfile(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two of them\nlocalhost slots=2\n")
    with RemoteWorkerGroup(replace(JOB, ranks=2), hosts, tmp_path) as group:
        group.wait_until_started()
        group.run_warmup()
        assert len(group.warmup["memory"]["per_rank_bytes"]) == 2
        assert group.request("train")["round_s"] > 0
        assert group.request("breakdown")["shares"]["compute"] > 0  # though rounds are left
        with pytest.raises(WorkerGroupFailed, match="trace"):
            group.request("trace", file="x")
    with pytest.raises(WorkerGroupFailed, match="4 ranks, 2 slots"):
        RemoteWorkerGroup(replace(JOB, ranks=4), hosts, tmp_path)


def ranks_of(job: Path) -> list[int]:
    """Processes that were given this file."""
    found = psutil.process_iter(["pid", "cmdline"])
    return [p.pid for p in found if str(job) in (p.info["cmdline"] or ())]


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_ranks_of_a_hostfile_end_with_their_group(tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    job = tmp_path / "job.json"
    with RemoteWorkerGroup(replace(JOB, ranks=2), tmp_path / "hosts", tmp_path) as group:
        wait_until(lambda: len(ranks_of(job)) >= 4, 60, "launchers and two ranks")
        raised = pytest.raises(KeyboardInterrupt)
        with raised, group:
            raise KeyboardInterrupt
        wait_until(lambda: not ranks_of(job), 30, "all are gone")


@pytest.mark.parametrize("text", ["", "localhost slots=0\n", "localhost\n", "# a slots=2\n"])
def test_a_hostfile_without_slots(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match="no slots"):
        slots_of(tmp_path / "hosts")


def test_failure_causes():
    assert (
        failure_cause("a\ntorch.OutOfMemoryError: CUDA out of memory. Tried\nb") == "out of memory"
    )
    assert failure_cause("Traceback\n\nValueError: no\n\n") == "ValueError: no"
    assert failure_cause(" \n") is None


def test_peak_memory_counts_only_later_allocations():
    before = torch.ones(64, 2**20)  # 256 MiB that do not count
    memory = PeakMemory(torch.device("cpu"))
    during = torch.ones(32, 2**20)
    del during
    peak_bytes = memory.read()["peak_bytes"]
    assert 120 * 2**20 < peak_bytes < 200 * 2**20
    assert before.sum() > 0


def late(world):
    """Rank 1 comes half a second late to a sum, and sends half a second late."""
    with CollectiveTimer() as timer:
        if world.rank == 1:
            time.sleep(0.5)
        dist.all_reduce(torch.ones(8))
        communication_s = timer.seconds["communication"]
        if world.rank == 1:
            time.sleep(0.5)
            dist.send(torch.ones(8), 0)
        else:
            dist.recv(torch.ones(8), 1)
    wait = dist.Work.wait
    return communication_s, timer.seconds["pipeline"], wait is timer._wait


@pytest.mark.dist
def test_time_in_collectives():
    (sum_0, pipe_0, restored), (sum_1, pipe_1, _) = run_ranks(late, 2)
    assert sum_0 > 0.4 and pipe_0 > 0.4 and restored
    assert sum_1 < sum_0 and pipe_1 < pipe_0
