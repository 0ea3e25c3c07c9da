"""Operators are built once, and a lock that a killed build left hangs nobody."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest

from fgpt.engine.launch import World
from fgpt.engine.ops import extensions_dir, operators_of
from tests.distributed import run_ranks
from tests.launched import Launch
from tests.tiny import Tiny

ADAM = {"type": "AdamW", "params": {}}
TORCH_ADAM = {"type": "AdamW", "params": {"torch_adam": True}}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("optimizer", "zero", "device", "names"),
    [
        (TORCH_ADAM, {}, "cpu", ["ShareMemCommBuilder"]),
        (TORCH_ADAM, OFFLOAD, "cpu", ["ShareMemCommBuilder"]),
        (TORCH_ADAM, OFFLOAD, "cuda", []),
        (ADAM, {}, "cpu", ["ShareMemCommBuilder", "FusedAdamBuilder"]),
        (ADAM, OFFLOAD, "cpu", ["ShareMemCommBuilder", "CPUAdamBuilder"]),
        (ADAM, OFFLOAD, "cuda", ["CPUAdamBuilder"]),
        (ADAM, {}, "cuda", ["FusedAdamBuilder"]),
        (ADAM, {"stage": 2, "offload_optimizer": {"device": "none"}}, "cuda", ["FusedAdamBuilder"]),
        ({"type": "Lion"}, OFFLOAD, "cuda", ["CPULionBuilder"]),
        ({"type": "SGD"}, {}, "cpu", ["ShareMemCommBuilder"]),
    ],
)
def test_what_a_run_will_compile(
    optimizer: dict, zero: dict, device: str, names: list[str]
) -> None:
    assert operators_of({"optimizer": optimizer, "zero_optimization": zero}, device) == names


def announced_rank(world: World) -> int:
    return world.rank


@pytest.mark.dist
def test_a_stale_lock_hangs_nobody(tiny: Tiny, tmp_path: Path) -> None:
    own = tmp_path / "extensions"
    run_ranks(announced_rank, 1)  # the fork server has built what a run needs
    with mock.patch.dict(os.environ):
        shutil.copytree(extensions_dir(), own)  # and it is not built again
    stale = own / "deepspeed_shm_comm" / "lock"
    stale.parent.mkdir(exist_ok=True)
    stale.touch()
    flags = tiny.flags("run", "--steps", 1)
    with Launch(["python"], *flags, env={"TORCH_EXTENSIONS_DIR": str(own)}) as launch:
        assert launch.wait(60) == 0, launch.output()
    assert not stale.exists()
