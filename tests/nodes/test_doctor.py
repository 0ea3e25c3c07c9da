"""`fgpt doctor` on several hosts names the host whose link is slow."""

from __future__ import annotations

import shutil

import pytest

from tests.nodes.hosts import Hosts
from tests.nodes.test_torchrun import PORT, TIMEOUT_S, output

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(240)]


def test_a_slow_link(hosts_3: Hosts) -> None:
    if shutil.which("tc") is None:
        pytest.skip("needs tc (Debian: iproute2)")
    try:
        hosts_3.slow_down(1, "50mbit")
    except OSError as error:
        pytest.skip(f"the kernel has no tbf queue: {error}")
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"node0:{PORT}"]
    command = ["torchrun", "--nnodes", "3", "--nproc-per-node", "1", *meet]
    programs = [host.start([*command, "-m", "fgpt.cli", "doctor"]) for host in hosts_3]
    codes = [program.wait(TIMEOUT_S) for program in programs]
    said = output(programs)
    assert codes == [0, 0, 0], said
    slow = [line for line in said.splitlines() if line.startswith("slow     network")]
    assert slow and "node1 sends at " in slow[0], said  # a busy machine may slow down others too
