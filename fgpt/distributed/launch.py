"""Process startup: read the launcher's environment, then create the process group.

    world_from_environment   rank and size from the launcher's variables; no side effects
    init_process_group       the process group of all ranks, and this rank's device
    shutdown                 destroy it; `hard_exit` where other ranks may hang in it

Works under `python`, `deepspeed`, `torchrun`, `accelerate launch`, `srun` and `mpirun`.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fgpt.distributed.interfaces import GLOO_INTERFACE, check_interfaces, reachable_interface
from fgpt.distributed.progress import LONG_FACTOR
from fgpt.errors import LaunchError

# launcher, its variables for rank, number of ranks, rank on this node, ranks on this node; inner
# launchers first: srun and mpirun may start one torchrun per node, srun may start mpirun
VARIABLES = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    (
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)
START_TIMEOUT = timedelta(minutes=5)
"""Limit for all ranks to start."""
CONNECT_TIMEOUT = timedelta(seconds=5)
"""Limit to connect to a store that exists."""
GROUP_TIMEOUT = timedelta(minutes=30)
"""Limit of a collective, where no watchdog needs a longer one (`group_timeout`)."""
PREPARE_TIMEOUT = timedelta(days=7)
"""Limit while rank 0 prepares data."""
# torch's messages after a peer has died
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Connection refused|Socket Timeout"
    r"|Connection was likely closed|Timed out waiting|remote process exit(ed|ing)"
    r"|ncclRemoteError|NCCL communicator was aborted",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class World:
    """This process's position among all processes of the run."""

    rank: int = 0
    """0 .. size - 1."""
    size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Rank on this node; the index of its GPU."""
    local_size: int = 1
    """Number of processes on this node."""

    @property
    def is_rank0(self) -> bool:
        """True on rank 0, which prints and writes files."""
        return self.rank == 0


def world_from_environment(environ: Mapping[str, str]) -> World:
    """Return the world that the launcher describes; `World()` without a launcher.

    Raises LaunchError if variables are missing, are not numbers, or contradict each other.
    """
    # a Slurm batch script has SLURM_PROCID too, but only srun's steps have a number of tasks
    launchers = [
        names
        for names in VARIABLES
        if names[2] in environ or (names[0] != "srun" and names[1] in environ)
    ]
    if not launchers:
        return World()
    inner, *outer = launchers
    world = _read_world(inner, environ)
    for launcher, _, size_name, *_ in outer:
        text = environ.get(size_name, "")
        if text.isdecimal() and int(text) > world.size:
            raise LaunchError(
                f"{launcher} started {text} processes, but {inner[0]} says {world.size}: groups of"
                f" {world.size} would train independently;"
                " start the script with one launcher, or unset the other's variables"
            )
    return world


def _read_world(names: tuple[str, str, str, str, str], environ: Mapping[str, str]) -> World:
    launcher, rank_name, size_name, local_rank_name, local_size_name = names
    values = []
    for name in (rank_name, size_name, local_rank_name):
        text = environ.get(name)
        if text is None or not text.isdecimal():
            raise LaunchError(
                f"environment variable {name} is {text!r}, {rank_name}, {size_name} and"
                f" {local_rank_name} must all be numbers: start with deepspeed, torchrun,"
                " accelerate launch or srun, or unset all three to run one process"
            )
        values.append(int(text))
    rank, size, local_rank = values
    if rank >= size:
        raise LaunchError(f"{rank_name}={rank} is not below {size_name}={size} ({launcher})")
    # srun writes "4(x2)": four on each of two nodes; deepspeed calls it LOCAL_SIZE
    local = environ.get(local_size_name) or environ.get("LOCAL_SIZE") or ""
    local = local.partition("(")[0].partition(",")[0]
    return World(rank, size, local_rank, int(local) if local.isdecimal() else size)


def launched_by_accelerate(environ: Mapping[str, str]) -> bool:
    """Return True if `accelerate launch` started this process with a DeepSpeed configuration."""
    return environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def device_kind() -> str:
    """Return `cuda` if a GPU is available, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def group_timeout(watchdog_s: float) -> timedelta:
    """Return the limit of a collective: above the watchdog's, which names the rank that is late."""
    watchdog = timedelta(seconds=min(LONG_FACTOR * watchdog_s, 1e9))
    return max(GROUP_TIMEOUT, watchdog + START_TIMEOUT)


def init_process_group(
    world: World,
    environ: Mapping[str, str],
    kind: str | None = None,
    timeout: timedelta = GROUP_TIMEOUT,
) -> torch.device:
    """Create the process group of all ranks; returns this rank's device.

    `kind`: cpu or cuda; None: a GPU if there is one. `timeout`: limit of a collective. Raises
    LaunchError without a device, if the ranks do not meet, or have GPUs only in part, or at another
    group size.
    """
    # 1. the device, which also selects the backend
    device = _claim_device(world, kind or device_kind())
    check_interfaces(environ)
    # 2. the group, over a store in which all ranks meet
    try:
        store = _rendezvous_store(world, environ)
        if world.size > 1:
            _check_device_kinds(world, store, device.type)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
        first = str(error).splitlines()[0]
        raise LaunchError(
            f"rank {world.rank} of {world.size} could not meet the others at {address}: {first};"
            " were all of them started, and is another run using this port? (--master_port)"
        ) from error
    # 3. the launcher's number of ranks
    if dist.get_world_size() != world.size:
        raise LaunchError(f"{world.size} processes expected, {dist.get_world_size()} joined")
    return device


def _rendezvous_store(world: World, environ: Mapping[str, str]) -> dist.Store:
    """Return the store in which all ranks meet; rank 0 waits there for START_TIMEOUT."""
    if world.size == 1:
        return dist.HashStore()  # needs no port
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            raise LaunchError(
                f"{world.size} processes expected, but {name} is not set: export it on"
                " every node (rank 0's host name, and a free port)"
            )
    _check_own_name(world, environ)
    handler = rendezvous("env://", world.rank, world.size, timeout=START_TIMEOUT)
    store: dist.Store = next(iter(handler))[0]
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _store_of_this_attempt(store, world, environ["MASTER_ADDR"])
    if world.local_size < world.size:
        _choose_interface(world, store, environ)
    store.set_timeout(GROUP_TIMEOUT)
    return store


def _check_device_kinds(world: World, store: dist.Store, kind: str) -> None:
    """Raise LaunchError on all ranks if some have a GPU and others have none.

    They would wait for each other in groups of different backends, until a timeout.
    """
    # 1. every rank says what it has
    store.set(f"fgpt/device/{world.rank}", f"{kind} on {socket.gethostname()}")
    if world.is_rank0:
        # 2. rank 0 compares, so that not every rank reads what every rank wrote
        found = store.multi_get([f"fgpt/device/{rank}" for rank in range(world.size)])
        ranks = dict(enumerate(text.decode() for text in found))
        kinds = {rank: text.partition(" ")[0] for rank, text in ranks.items()}
        firsts = sorted({of: rank for rank, of in reversed(kinds.items())}.values())
        verdict = "; ".join(f"rank {r}: {ranks[r]}" for r in firsts) if len(firsts) > 1 else ""
        store.set("fgpt/device kinds", verdict)
    # 3. and all read the verdict, before rank 0 ends with it, and the store with rank 0
    if verdict := store.get("fgpt/device kinds").decode():
        deadline = time.monotonic() + CONNECT_TIMEOUT.total_seconds()
        n_told = store.add("fgpt/ranks that know the device kinds", 1)
        while world.is_rank0 and n_told < world.size and time.monotonic() < deadline:
            time.sleep(0.05)
            n_told = store.add("fgpt/ranks that know the device kinds", 0)
        raise LaunchError(
            f"not all ranks have a GPU ({verdict}): check nvidia-smi and CUDA_VISIBLE_DEVICES"
            " there, or train all on CPUs: export CUDA_VISIBLE_DEVICES= on every node"
        )


def _choose_interface(world: World, store: dist.Store, environ: Mapping[str, str]) -> None:
    """Have gloo use an interface that the other hosts can reach, and say so once per host."""
    interface = reachable_interface(world.size, store, environ)
    if interface is None:
        return
    os.environ[GLOO_INTERFACE] = interface  # read by torch whenever it makes a gloo group
    if world.local_rank == 0:
        print_error(
            world.rank,
            f"{socket.gethostname()}: its own name means a loopback address, which other hosts"
            f" cannot reach: using {GLOO_INTERFACE}={interface}; export it to choose another",
        )


def _check_own_name(world: World, environ: Mapping[str, str]) -> None:
    """Raise LaunchError if torchrun's ranks, all on this host, would wait for its unknown name.

    On several nodes a name may become known later, and the ranks wait for it.
    """
    if "TORCHELASTIC_RUN_ID" not in environ or world.local_size < world.size:
        return
    name = environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"MASTER_ADDR: this host cannot resolve {name!r} ({error}), which is its own name:"
            " start torchrun with --local-addr 127.0.0.1, or add the name to /etc/hosts"
        ) from error


def _store_of_this_attempt(agent_store: dist.Store, world: World, host: str) -> dist.Store:
    """Return rank 0's own store, whose port it writes into torchrun's store.

    torchrun keeps one store for all attempts (--max-restarts): a restarted rank would find the
    addresses of dead ranks in it. A port of a dead rank 0 is refused, and read again.
    """
    key = "fgpt/port of rank 0's store"
    if world.is_rank0:
        own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=START_TIMEOUT)
        agent_store.set(key, str(own.port))
        return own
    deadline = time.monotonic() + START_TIMEOUT.total_seconds()
    while True:
        port = int(agent_store.get(key))
        try:
            return dist.TCPStore(host, port, wait_for_workers=False, timeout=CONNECT_TIMEOUT)
        except dist.DistError:
            if time.monotonic() > deadline:
                raise


def lost_rank_reason(error: RuntimeError) -> str | None:
    """Return the part of torch's message that means "another rank is gone"; None for others."""
    match = _LOST.search(str(error))
    return match[0] if match else None


def default_store() -> dist.Store:
    """Return the store in which the ranks of the process group met."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


def shutdown() -> None:
    """Destroy all process groups, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def print_error(rank: int, text: str) -> None:
    """Print one line on stderr, with the rank unless it is 0."""
    sender = f"fgpt: rank {rank}" if rank else "fgpt"
    print(f"{sender}: {text}", file=sys.stderr, flush=True)


def hard_exit(rank: int, text: str, code: int) -> NoReturn:
    """Print an error and exit without cleanup, which would wait for ranks that may hang."""
    print_error(rank, text)
    sys.stdout.flush()
    os._exit(code)


def _claim_device(world: World, kind: str) -> torch.device:
    if kind == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, available_cores() // world.local_size))
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # srun --gpus-per-task=1 shows each process only its own GPU
    index = 0 if visible == 1 and "SLURM_STEP_NUM_TASKS" in os.environ else world.local_rank
    if index >= visible:
        raise LaunchError(
            f"local rank {world.local_rank} has no GPU: this process sees {visible};"
            " start at most one process per GPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
