"""The world that each launcher's environment describes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fgpt.distributed.launch import (
    World,
    init_process_group,
    lost_rank_reason,
    world_from_environment,
)
from fgpt.errors import LaunchError
from tests.ranks import free_port, start_ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_a_host_that_does_not_know_its_name() -> None:
    """torchrun makes the host's name MASTER_ADDR, and the ranks would wait for it for minutes."""
    environ = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "no.such.host.invalid"}
    with pytest.raises(LaunchError, match="cannot resolve 'no.such.host.invalid'.*--local-addr"):
        init_process_group(World(0, 2, 0, 2), {**environ, "MASTER_PORT": "29500"})


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED, SRUN, MPIRUN])
def test_every_launcher_says_the_same(environ: dict[str, str]) -> None:
    assert world_from_environment(environ) == World(rank=3, size=4, local_rank=1, local_size=2)


def test_nobody_announced_anything() -> None:
    assert world_from_environment({"PATH": "/bin"}) == World(0, 1, 0, 1)


def test_torchrun_inside_srun() -> None:
    one_per_node = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert world_from_environment(TORCHRUN | one_per_node).size == 4


def test_a_launcher_that_started_more_than_torch_knows_of() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with pytest.raises(LaunchError, match="srun started 4 processes, but torchrun says 1"):
        world_from_environment(alone | SRUN)


def test_torchrun_in_a_slurm_batch_script() -> None:
    # sbatch sets a rank for the script itself, but no step, so no number of tasks
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    assert world_from_environment(TORCHRUN | batch) == world_from_environment(TORCHRUN)
    assert world_from_environment(batch) == World()


def test_mpirun_inside_srun() -> None:
    daemons = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    assert world_from_environment(MPIRUN | daemons) == world_from_environment(MPIRUN)


@pytest.mark.parametrize(
    "broken",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        TORCHRUN | {"RANK": "-1"},
        TORCHRUN | {"RANK": "one"},
        TORCHRUN | {"RANK": ""},
        TORCHRUN | {"RANK": "4"},
        {name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"},
    ],
)
def test_half_an_announcement(broken: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="RANK"):
        world_from_environment(broken)


@pytest.mark.parametrize(
    "text",
    [
        "[..pair.cc:537] Read error [127.0.0.1]:15245: Connection reset by peer. This is",
        "[..pair.cc:553] Connection closed by peer [127.0.0.1]:17289.",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote",
    ],
)
def test_a_lost_rank_is_known_by_torchs_words(text: str) -> None:
    assert lost_rank_reason(RuntimeError(text))
    assert lost_rank_reason(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.dist
def test_no_address_to_meet_at(tmp_path: Path) -> None:
    with start_ranks(_join_without, 2, "MASTER_ADDR", join=False) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
        assert all("MASTER_ADDR is not set" in text for text in ranks.results())


@pytest.mark.dist
def test_one_process_listens_nowhere() -> None:
    env = {"MASTER_PORT": str(free_port())}
    with start_ranks(_join_alone, 1, env=env, join=False) as ranks:
        assert ranks.wait() == [0], ranks.output()
        assert ranks.results() == [("gloo", 1, [])]


def _join_without(world: World, name: str) -> str:
    from fgpt.distributed.launch import init_process_group

    try:
        init_process_group(world, {k: v for k, v in os.environ.items() if k != name})
    except LaunchError as error:
        return str(error)
    return "joined"


def _join_alone(world: World) -> tuple[str, int, list[int]]:
    import psutil
    import torch.distributed as dist

    from fgpt.distributed.launch import init_process_group

    init_process_group(world, os.environ)
    master = int(os.environ["MASTER_PORT"])
    ports = [c.laddr.port for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    return dist.get_backend(), dist.get_world_size(), [p for p in ports if p == master]


def test_an_unknown_network_interface_is_named() -> None:
    environ = {"GLOO_SOCKET_IFNAME": "lo,nope0"}
    with pytest.raises(LaunchError, match="no network interface 'nope0'; it has .*lo"):
        init_process_group(World(), environ)


def _join_as(world: World, kinds: list[str]) -> str:
    """What a rank whose node has this kind of device is told."""
    from unittest import mock

    import torch

    from fgpt.distributed import launch

    device = torch.device(kinds[world.rank])
    with mock.patch.object(launch, "_claim_device", lambda *_: device):
        try:
            launch.init_process_group(world, os.environ)
        except LaunchError as error:
            return str(error)
    return "joined"


@pytest.mark.dist
def test_devices_of_two_kinds_are_named_before_the_group_waits() -> None:
    kinds = ["cuda", "cuda", "cpu"]
    with start_ranks(_join_as, 3, kinds, join=False) as ranks:
        assert ranks.wait(30) == [0, 0, 0], ranks.output()
        host = socket.gethostname()
        for said in ranks.results():
            assert (
                f"not all ranks have a GPU (rank 0: cuda on {host}; rank 2: cpu on {host})" in said
            )
