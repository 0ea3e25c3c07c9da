"""`deepspeed --hostfile`: pdsh over ssh to an sshd on each host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launched import TRAIN
from tests.nodes.hosts import Hosts
from tests.nodes.test_torchrun import one_hosts_losses
from tests.ranks import wait_until
from tests.tiny import Tiny

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(240)]

SSHD = """
HostKey {key}
AuthorizedKeysFile {key}.pub
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
PidFile none
"""
SSH = """
IdentityFile {key}
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def start_sshd(hosts: Hosts, folder: Path) -> None:
    """Start an sshd on each host, which lets one another in by a new key."""
    sshd = shutil.which("sshd")
    missing = [tool for tool in ("sshd", "ssh", "pdsh") if shutil.which(tool) is None]
    if sshd is None or missing:
        pytest.skip(f"needs {', '.join(missing)} (Debian: openssh-server, pdsh)")
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    for name, text in (("sshd_config", SSHD), ("ssh_config", SSH)):
        (folder / name).write_text(text.format(key=key))
    for host in hosts:
        host.run(f"mount --bind {folder / 'ssh_config'} /etc/ssh/ssh_config; mkdir /run/sshd")
        host.start([sshd, "-D", "-e", "-f", folder / "sshd_config"])
    for host in hosts:

        def answers(name: str = host.name) -> bool:
            return hosts[0].start(["ssh", name, "true"]).wait(30) == 0

        wait_until(answers, 30, f"{host.name}'s sshd answers")


@pytest.mark.parametrize("n", [2, 3])
def test_a_hostfile(n: int, tiny: Tiny, request: pytest.FixtureRequest) -> None:
    hosts: Hosts = request.getfixturevalue(f"hosts_{n}")
    start_sshd(hosts, tiny.folder)
    hostfile = tiny.folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    home = tiny.folder / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    command = ["deepspeed", "--hostfile", hostfile, "--master_port", "29500", TRAIN]
    launcher = hosts[0].start([*command, *tiny.flags("run")], {"HOME": str(home)})
    assert launcher.wait(120) == 0, launcher.output()
    assert tiny.losses("run") == one_hosts_losses(tiny, n)
