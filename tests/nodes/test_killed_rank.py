"""kill -9 of one rank, and no launcher tells the others: both hosts see it; the run resumes."""

from __future__ import annotations

import signal
import time

import pytest

from tests.nodes.hosts import Hosts
from tests.nodes.test_cut_link import ranks
from tests.nodes.test_srun import PLACES, srun
from tests.nodes.test_torchrun import TIMEOUT_S
from tests.ranks import kill, run_ranks, wait_until
from tests.tiny import Tiny, train_all

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(300)]

GONE_S = 10.0


@pytest.mark.parametrize("killed", range(len(PLACES)))
def test_a_killed_rank(hosts_2: Hosts, tiny: Tiny, killed: int) -> None:
    options = ["--set=checkpoint.every=10", "--set=train.log_every=1"]
    # 1. kill a rank once there is a checkpoint; nobody waits for the watchdog's 10 minutes
    programs = srun(hosts_2, tiny.flags("run", *options, "--steps", 1_000_000))
    newest = tiny.path("run") / "checkpoints" / "latest"
    wait_until(newest.exists, TIMEOUT_S, "a checkpoint")
    kill(programs[killed].pid)
    begun = time.monotonic()
    # 2. the others end, on its host and on the other one, and name it where they can
    wait_until(lambda: not ranks(hosts_2), GONE_S, "no rank is left")
    print(f"rank {killed}: the last rank ended {time.monotonic() - begun:.1f} s after the kill")
    codes = [program.wait(10) for program in programs]
    assert codes.pop(killed) in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert codes == [1, 1], [program.output() for program in programs]
    for rank, program in enumerate(programs):
        if rank != killed:
            said = program.output()
            assert said.count("another rank is gone") == 1 and "Traceback" not in said, said
            # a neighbor on its host knows its number, and tells the other host
            if killed == 1 or (killed, rank) == (0, 1):
                assert f"another rank is gone (rank {killed})" in said, said
    # 3. the run goes on, bit for bit
    step = int(newest.read_text().removeprefix("step_"))
    again = srun(hosts_2, tiny.flags("run", *options, "--steps", step + 4, "--resume", "auto"))
    assert [program.wait(TIMEOUT_S) for program in again] == [0, 0, 0], again[0].output()
    reference = tiny.flags("reference", "--set=checkpoint.every=0", "--steps", step + 4)
    assert run_ranks(train_all, len(PLACES), [reference])[0][0].code == 0
    assert tiny.losses("run") == tiny.losses("reference")
