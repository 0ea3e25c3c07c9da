"""torchrun on several hosts: the losses of one host, and a run that is not theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from tests.launched import TRAIN
from tests.nodes.hosts import Hosts, Program
from tests.ranks import run_ranks, wait_until
from tests.tiny import Tiny, train_all

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

PORT = "29400"
TIMEOUT_S = 120.0


def torchrun(
    hosts: Hosts,
    flags: Sequence[object],
    *,
    dynamic: bool = False,
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> list[Program]:
    """Start the trainer with one rank on each host. `dynamic`: they meet by the c10d rendezvous,
    which numbers the hosts; else each is given its number.
    """
    programs = []
    for i, host in enumerate(hosts):
        meet = ["--node-rank", str(i), "--master-addr", "node0", "--master-port", PORT]
        if dynamic:
            meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"node0:{PORT}"]
        command = ["torchrun", "--nnodes", str(len(hosts)), "--nproc-per-node", "1", *meet]
        programs.append(host.start([*command, *options, TRAIN, *flags], env))
    return programs


def output(programs: Sequence[Program]) -> str:
    """What all hosts said."""
    return "\n".join(program.output() for program in programs)


def succeed(hosts: Hosts, programs: Sequence[Program]) -> str:
    """Wait for all programs; returns their output."""
    codes = [program.wait(TIMEOUT_S) for program in programs]
    assert codes == [0] * len(programs), output(programs)
    wait_until(lambda: not hosts.processes(), 10, "no process is left")
    return output(programs)


def one_hosts_losses(tiny: Tiny, n: int) -> list[tuple[int, float]]:
    """The losses of the same run on one host."""
    assert run_ranks(train_all, n, [tiny.flags("one_host")])[0][0].code == 0
    return tiny.losses("one_host")


def test_two_hosts_have_the_losses_of_one(hosts_2: Hosts, tiny: Tiny) -> None:
    said = succeed(hosts_2, torchrun(hosts_2, tiny.flags("run")))
    assert "GLOO_SOCKET_IFNAME" not in said
    assert tiny.losses("run") == one_hosts_losses(tiny, 2)


@pytest.mark.slow
def test_three_hosts_that_number_themselves(hosts_3: Hosts, tiny: Tiny) -> None:
    succeed(hosts_3, torchrun(hosts_3, tiny.flags("run"), dynamic=True))
    assert tiny.losses("run") == one_hosts_losses(tiny, 3)
