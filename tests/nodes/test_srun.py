"""srun's variables, set by hand, on several hosts: two ranks on the first, one on the second."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.launched import TRAIN
from tests.nodes.hosts import Hosts, Program
from tests.nodes.test_torchrun import TIMEOUT_S, one_hosts_losses, output, succeed
from tests.tiny import Tiny

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(240)]

PLACES = [(0, 0), (0, 1), (1, 0)]
"""Of each rank: its host, and its number there."""


def srun(hosts: Hosts, flags: Sequence[str]) -> list[Program]:
    """Start the trainer's three ranks."""
    meet = {"MASTER_ADDR": "node0", "MASTER_PORT": "21234"}
    step = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_JOB_ID": "1"}
    programs = []
    for rank, (host, local_rank) in enumerate(PLACES):
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank)}
        programs.append(hosts[host].start(["python", TRAIN, *flags], meet | step | place))
    return programs


def test_variables_of_srun(hosts_2: Hosts, tiny: Tiny) -> None:
    succeed(hosts_2, srun(hosts_2, tiny.flags("run")))
    assert tiny.losses("run") == one_hosts_losses(tiny, 3)


def test_hosts_that_do_not_share_the_run_directory(hosts_2: Hosts, tiny: Tiny) -> None:
    hosts_2[1].run(f"mkdir {tiny.folder}/runs; mount -t tmpfs private {tiny.folder}/runs")
    programs = srun(hosts_2, tiny.flags("runs/run"))
    assert [program.wait(TIMEOUT_S) for program in programs] == [2, 2, 2], output(programs)
    refusal = f"node1: --run_dir {tiny.path('runs/run')}: is not rank 0's directory"
    assert refusal in programs[0].output() and "Traceback" not in output(programs)
    assert [path.name for path in tiny.path("runs/run").iterdir()] == ["lock"]
