"""The hosts that the other tests here use: separate, joined, cut, and gone with their test."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import psutil

from tests.nodes.hosts import Hosts
from tests.ranks import ROOT, kill, wait_until

CALL = """
import socket
try:
    socket.create_connection(("node1", 9), timeout=1)
except ConnectionRefusedError:
    print("refused")
except OSError:
    print("no answer")
"""
ABANDONED = """
import sys, time
from pathlib import Path
from tests.nodes.hosts import Hosts
with Hosts(2, Path(sys.argv[1])) as hosts:
    hosts[1].start(["sleep", "600"])
    print(*(host.pid for host in hosts), flush=True)
    time.sleep(600)
"""


def test_hosts_are_separate_and_joined(hosts_2: Hosts) -> None:
    for host in hosts_2:
        assert host.run("hostname").strip() == host.name
        assert host.run("hostname -I").split()[0] == host.address
        assert [line for line in host.run("ps -e -o comm=").split() if line == "cat"] == ["cat"]
    hosts_2[0].run("echo mine > /dev/shm/file")
    assert hosts_2[1].run("ls /dev/shm") == ""
    call = f"{sys.executable} -c {shlex.quote(CALL)}"
    assert hosts_2[0].run(call).strip() == "refused"  # node1 answers that nothing listens there
    hosts_2.cut(1)
    assert hosts_2[0].run(call).strip() == "no answer"
    hosts_2.mend(1)
    assert hosts_2[0].run(call).strip() == "refused"


def test_hosts_end_with_a_killed_test(hosts_2: Hosts, tmp_path: Path) -> None:
    before = psutil.net_if_addrs().keys()
    command = [sys.executable, "-c", ABANDONED, str(tmp_path)]
    test = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert test.stdout is not None
    pids = [int(pid) for pid in test.stdout.readline().split()]
    assert len(pids) == 2 and all(map(psutil.pid_exists, pids))
    kill(test.pid)
    test.wait()
    test.stdout.close()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), 10, "the hosts end")
    assert psutil.net_if_addrs().keys() == before
