"""Hosts on this machine: Linux namespaces with a name, a network and processes of their own.

with Hosts(2, folder) as hosts:
    runs = [host.start(["torchrun", ...]) for host in hosts]
    codes = [run.wait(60) for run in runs]
    hosts.cut(1)          host 1 is off the network: packets are dropped, no connection is closed
    hosts[1].processes()  what still runs there

A host has its own network interface eth0 (10.77.0.1, 10.77.0.2, ...), UTS name (node0, node1,
...), process ids, IPC, /dev/shm, /run and /etc/hosts, and no DNS; files are shared, as on a network
file system. A virtual cable (veth) joins each host to a switch, a bridge in one more namespace.
Needs root, iproute2 and util-linux.

Nothing remains, however a test ends: the first process of each host reads a pipe from this process
until it closes, and the kernel kills a host's other processes with its first. Namespaces and cables
have no names, and the kernel removes them with their last process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tests.ranks import ROOT, TIMEOUT_S, kill, wait_until

TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")
# the first process of a host: NAME HOSTS_FILE
HOST = """
hostname "$0"
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount --bind "$1" /etc/hosts
mount --bind /dev/null /etc/resolv.conf
ip link set lo up
echo ready
exec cat
"""
SWITCH = "ip link add bridge0 type bridge; ip link set bridge0 up; echo ready; exec cat"
CABLE = """
ip link add port{i} type veth peer name eth0 netns {pid}
ip link set port{i} master bridge0 up
"""


def why_no_hosts() -> str:
    """Return why hosts cannot be made here; empty if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts need Linux and root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"hosts need {', '.join(missing)} (Debian: iproute2, util-linux, mount, hostname)"
    try:
        with _Namespaces(["--net"], SWITCH):
            return ""
    except OSError as error:
        return f"the kernel or the container forbids network namespaces: {error}"


class Hosts:
    """`n` hosts joined by one switch; a context manager that ends every process on them.

    `names[i]`: the lines of host i's /etc/hosts; default: each host knows all by their addresses.
    """

    def __init__(self, n: int, folder: Path, names: Sequence[str] | None = None):
        with contextlib.ExitStack() as undo:
            self._switch = undo.enter_context(_Namespaces(["--net"], SWITCH))
            known = "".join(f"{address(i)} node{i}\n" for i in range(n))
            self.hosts = []
            for i in range(n):
                etc = folder / f"etc_hosts_{i}"
                etc.write_text("127.0.0.1 localhost\n" + (names[i] if names else known))
                host = Host(f"node{i}", address(i), undo, etc, folder)
                self.hosts.append(host)
                self._switch.run(CABLE.format(i=i, pid=host.pid))
                host.run(f"ip addr add {host.address}/24 dev eth0; ip link set eth0 up")
            self._undo = undo.pop_all()

    def cut(self, i: int) -> None:
        """Take host i off the network: what it sends, and what is sent to it, is lost."""
        self._switch.run(f"ip link set port{i} down")

    def mend(self, i: int) -> None:
        """Undo `cut`."""
        self._switch.run(f"ip link set port{i} up")

    def slow_down(self, i: int, rate: str) -> None:
        """Limit what host i sends, in tc's notation. Needs tc (iproute2) and its tbf queue."""
        self.hosts[i].run(f"tc qdisc add dev eth0 root tbf rate {rate} burst 64kb latency 400ms")

    def processes(self) -> list[psutil.Process]:
        """What runs on any of the hosts."""
        return [process for host in self.hosts for process in host.processes()]

    def kill_all(self) -> None:
        """Send SIGKILL to what runs on any of the hosts."""
        for process in self.processes():
            kill(process.pid)

    def __getitem__(self, i: int) -> Host:
        return self.hosts[i]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def __len__(self) -> int:
        return len(self.hosts)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        for host in self.hosts:
            for program in host.programs:
                program.wait(10)  # its host has ended, so it has


def address(i: int) -> str:
    """The address of host i."""
    return f"10.77.0.{i + 1}"


class Host:
    """One host. Started programs run in ROOT, with this process's environment."""

    def __init__(
        self, name: str, address: str, undo: contextlib.ExitStack, etc_hosts: Path, folder: Path
    ):
        self.name, self.address, self._folder = name, address, folder
        kinds = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc"]
        self._namespaces = undo.enter_context(_Namespaces(kinds, HOST, name, str(etc_hosts)))
        self.pid = self._namespaces.pid
        self.programs: list[Program] = []

    def run(self, script: str) -> str:
        """Run a shell script there; returns its output. Raises OSError if it fails."""
        return self._namespaces.run(script)

    def start(self, command: Sequence[object], env: Mapping[str, str] | None = None) -> Program:
        """Start a program there; Python's programs are those of this interpreter."""
        own = Path(sys.executable).parent / str(command[0])
        words = [str(own) if own.exists() else str(command[0]), *map(str, command[1:])]
        output = self._folder / f"{self.name}.{len(self.programs)}.out"
        self.programs.append(Program(self.name, self._namespaces.enter(words), output, env or {}))
        return self.programs[-1]

    def processes(self) -> list[psutil.Process]:
        """What runs there, except its first process."""
        return [p for p in psutil.process_iter() if p.pid != self.pid and self._has(p)]

    def _has(self, process: psutil.Process) -> bool:
        try:
            is_here = _pid_namespace(process.pid) == _pid_namespace(self.pid)
            return is_here and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, psutil.Error):
            return False


class Program:
    """A program on a host."""

    def __init__(self, host: str, command: Sequence[str], output: Path, env: Mapping[str, str]):
        self.host, self._file = host, output
        with open(output, "w") as out:
            self._nsenter = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id, outside of the host."""
        children = wait_until(psutil.Process(self._nsenter.pid).children, 10, "nsenter's child")
        return int(children[0].pid)

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._nsenter.poll() is None

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Return its exit code (128 + N or -N: signal N). Raises AssertionError after the time."""
        try:
            return self._nsenter.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still ran after {timeout_s} s\n{self.output()}") from None

    def output(self) -> str:
        """Return its output so far."""
        return self._file.read_text()


class _Namespaces:
    """New namespaces, which live as long as their first process, a shell, reads this one's pipe."""

    def __init__(self, kinds: Sequence[str], script: str, *arguments: str):
        shell = ["sh", "-ec", script, *arguments]
        self._process = subprocess.Popen(
            ["unshare", *kinds, *shell],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline().decode().strip()
        if said != "ready":
            self.close()
            raise OSError(f"unshare {' '.join(kinds)}: {said}")
        # with --fork, unshare itself stays outside of the new PID namespace
        children = psutil.Process(self._process.pid).children() if "--fork" in kinds else []
        self.pid = children[0].pid if children else self._process.pid
        self._flags = [kind for kind in kinds if kind not in ("--fork", "--mount-proc")]

    def enter(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` inside, in ROOT."""
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', str(ROOT), *command]
        return ["nsenter", "--target", str(self.pid), *self._flags, "--", *inside]

    def run(self, script: str) -> str:
        command = self.enter(["sh", "-ec", script])
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise OSError(f"{script.strip()}: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        """End the first process, and with it, in a PID namespace, all others."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            kill(self._process.pid)
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> _Namespaces:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pid_namespace(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/pid").st_ino
