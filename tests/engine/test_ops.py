"""Operators are built once, and a lock that a killed build left hangs nobody."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from fgpt.distributed.launch import World
from fgpt.engine.deepspeed.ops import load_operators, operators_of
from tests.launched import Launch
from tests.ranks import run_ranks
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


def stale_lock(folder: Path) -> Path:
    """What a killed build of DeepSpeed's fused Adam has left in a folder of extensions."""
    stale = folder / "fused_adam" / "lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    return stale


EMPTY = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "fused_adam"};
PyMODINIT_FUNC PyInit_fused_adam() { return PyModule_Create(&module); }
"""


def build_an_empty_adam(world: World, source: Path) -> None:
    """DeepSpeed's builder at work, on a source of its own: torch's headers take a minute."""
    from deepspeed.accelerator import get_accelerator

    builder = type(get_accelerator().create_op_builder("FusedAdamBuilder"))
    with mock.patch.object(builder, "sources", lambda self: [str(source)]):
        load_operators(["FusedAdamBuilder"])


@pytest.mark.dist
def test_a_stale_lock_hangs_nobody(tmp_path: Path) -> None:
    own, source = tmp_path / "extensions", tmp_path / "empty.cpp"
    source.write_text(EMPTY)
    stale = stale_lock(own)
    run_ranks(build_an_empty_adam, 2, source, env={"TORCH_EXTENSIONS_DIR": str(own)})
    assert not stale.exists()
    assert list(stale.parent.glob("*.so"))


@pytest.mark.slow  # compiles DeepSpeed's own Adam
@pytest.mark.dist
@pytest.mark.timeout(400)
def test_a_stale_lock_hangs_no_run(tiny: Tiny, tmp_path: Path) -> None:
    own = tmp_path / "extensions"
    stale = stale_lock(own)
    flags = tiny.flags("run", "--steps", 1, ds=tiny.ds("compiled", optimizer=ADAM))
    with Launch(["python"], *flags, env={"TORCH_EXTENSIONS_DIR": str(own)}) as launch:
        assert launch.wait(390) == 0, launch.output()
    assert not stale.exists()
    assert list(stale.parent.glob("*.so"))


@pytest.mark.dist
def test_the_shipped_optimizer_needs_no_compiler(tiny: Tiny, tmp_path: Path) -> None:
    own = tmp_path / "extensions"
    env = {"TORCH_EXTENSIONS_DIR": str(own), "CXX": "/bin/false"}
    with Launch(["python"], *tiny.flags("run", "--steps", 1), env=env) as launch:
        assert launch.wait(90) == 0, launch.output()
    assert not own.exists()
