"""Operators are built once, and a lock that a killed build left hangs nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgpt.engine.ops import operators_of
from tests.launched import Launch
from tests.tiny import Tiny

ADAM = {"type": "AdamW", "params": {}}
TORCH_ADAM = {"type": "AdamW", "params": {"torch_adam": True}}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("optimizer", "zero", "names"),
    [
        (TORCH_ADAM, {}, []),
        (TORCH_ADAM, OFFLOAD, []),
        (ADAM, {}, ["FusedAdamBuilder"]),
        (ADAM, OFFLOAD, ["CPUAdamBuilder"]),
        (ADAM, {"stage": 2, "offload_optimizer": {"device": "none"}}, ["FusedAdamBuilder"]),
        ({"type": "Lion"}, OFFLOAD, ["CPULionBuilder"]),
        ({"type": "SGD"}, {}, []),
    ],
)
def test_what_a_run_will_compile(optimizer: dict, zero: dict, names: list[str]) -> None:
    assert operators_of({"optimizer": optimizer, "zero_optimization": zero}) == names


@pytest.mark.dist
def test_a_stale_lock_hangs_nobody(tiny: Tiny, tmp_path: Path) -> None:
    own = tmp_path / "extensions"
    stale = own / "fused_adam" / "lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    flags = tiny.flags("run", "--steps", 1, ds=tiny.ds("compiled", optimizer=ADAM))
    with Launch(["python"], *flags, env={"TORCH_EXTENSIONS_DIR": str(own)}) as launch:
        assert launch.wait(150) == 0, launch.output()
    assert not stale.exists()
    assert list(stale.parent.glob("*.so"))


@pytest.mark.dist
def test_the_shipped_optimizer_needs_no_compiler(tiny: Tiny, tmp_path: Path) -> None:
    own = tmp_path / "extensions"
    env = {"TORCH_EXTENSIONS_DIR": str(own), "CXX": "/bin/false"}
    with Launch(["python"], *tiny.flags("run", "--steps", 1), env=env) as launch:
        assert launch.wait(90) == 0, launch.output()
    assert not own.exists()
