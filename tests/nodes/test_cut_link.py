"""A host that leaves the network without a word: its cable drops every packet from now on.

Connections stay open and collectives would wait for half an hour. All ranks end, on both sides of
the cut, and say which host is silent; the run then resumes exactly.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import psutil
import pytest

from tests.launched import TRAIN
from tests.nodes.hosts import Hosts, Program
from tests.nodes.test_srun import srun
from tests.nodes.test_torchrun import TIMEOUT_S, torchrun
from tests.ranks import run_ranks, wait_until
from tests.tiny import Tiny, train_all

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(400)]

EVERY = 10
WATCHDOG_S = 10
GONE_S = 60.0
"""Of which the watchdog takes WATCHDOG_S, or three times the longest step, and a few seconds."""
LAUNCHERS: dict[str, tuple[Callable[..., list[Program]], int]] = {
    # how it starts, its number of ranks
    "srun": (srun, 3),
    "torchrun": (torchrun, 2),
    "torchrun c10d": (lambda *args: torchrun(*args, dynamic=True), 2),
}


def ranks(hosts: Hosts) -> list[psutil.Process]:
    """The trainer's processes, without torchrun's."""
    found = []
    for process in hosts.processes():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if str(TRAIN) in words and not any(word.endswith("torchrun") for word in words):
                found.append(process)
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cut_link(hosts_2: Hosts, tiny: Tiny, launcher: str) -> None:
    start, n = LAUNCHERS[launcher]
    options = [f"--set=checkpoint.every={EVERY}", "--set=train.log_every=1"]
    options.append(f"--set=train.watchdog_s={WATCHDOG_S}")
    # 1. cut the link once there is a checkpoint
    programs = start(hosts_2, tiny.flags("run", *options, "--steps", 1_000_000))
    newest = tiny.path("run") / "checkpoints" / "latest"
    wait_until(newest.exists, TIMEOUT_S, "a checkpoint")
    hosts_2.cut(1)
    begun = time.monotonic()
    # 2. all ranks end, and their launchers; torchrun waits 60 s and more for its own c10d store
    wait_until(lambda: not ranks(hosts_2), GONE_S, "no rank is left")
    print(f"{launcher}: the last rank ended {time.monotonic() - begun:.1f} s after the cut")
    if launcher == "torchrun c10d":
        hosts_2.kill_all()
    wait_until(lambda: not hosts_2.processes(), 10, "no process is left")
    assert all(program.wait(10) != 0 for program in programs)
    for program in programs:
        silent = f"rank {n - 1} on node1" if program.host == "node0" else "rank 0"
        assert f"{silent} sent no sign of life" in program.output(), program.output()
    # 3. the run goes on, bit for bit, with the link mended
    hosts_2.mend(1)
    step = int(newest.read_text().removeprefix("step_"))
    again = start(hosts_2, tiny.flags("run", *options, "--steps", step + 4, "--resume", "auto"))
    assert [program.wait(TIMEOUT_S) for program in again] == [0] * len(again), again[0].output()
    reference = tiny.flags("reference", "--set=checkpoint.every=0", "--steps", step + 4)
    assert run_ranks(train_all, n, [reference])[0][0].code == 0
    assert tiny.losses("run") == tiny.losses("reference")
