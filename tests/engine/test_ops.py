"""DeepSpeed's operators are built once, and a stale lock file does not block a build."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import psutil
import pytest

from fgpt.config.deepspeed.settings import DeepSpeedSettings
from fgpt.distributed.launch import World
from fgpt.engine.deepspeed import ops
from tests.launched import Launch
from tests.ranks import start_ranks, wait_until
from tests.tiny import Tiny

ADAM = {"type": "AdamW", "params": {"torch_adam": False}}
TORCH_ADAM = {"type": "AdamW", "params": {"torch_adam": True}}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("optimizer", "zero", "operator"),
    [
        (TORCH_ADAM, {}, None),
        (TORCH_ADAM, OFFLOAD, None),
        ({"type": "AdamW"}, OFFLOAD, None),
        ({"type": "Adam", "params": {"bias_correction": False}}, {}, "FusedAdamBuilder"),
        (ADAM, {}, "FusedAdamBuilder"),
        (ADAM, OFFLOAD, "CPUAdamBuilder"),
        (ADAM, {"stage": 2, "offload_optimizer": {"device": "none"}}, "FusedAdamBuilder"),
        ({"type": "Lion"}, OFFLOAD, "CPULionBuilder"),
        ({"type": "SGD"}, {}, None),
    ],
)
def test_operator_of_a_run(optimizer: dict, zero: dict, operator: str | None) -> None:
    settings = DeepSpeedSettings({"optimizer": optimizer, "zero_optimization": zero})
    assert settings.operator == operator


def stale_lock(folder: Path) -> Path:
    """Create the lock file that a killed build of DeepSpeed's fused Adam leaves behind."""
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
    """Run DeepSpeed's builder on an empty source; torch's headers take a minute."""
    from deepspeed.accelerator import get_accelerator

    builder = type(get_accelerator().create_op_builder("FusedAdamBuilder"))
    with (
        mock.patch.object(builder, "sources", lambda self: [str(source)]),
        mock.patch.object(ops, "PROGRESS_EVERY_S", 1.0),
    ):
        ops.load_operator("FusedAdamBuilder", partial(print, file=sys.stderr, flush=True))


@pytest.mark.dist
def test_a_stale_lock_blocks_no_rank(tmp_path: Path) -> None:
    own, source = tmp_path / "extensions", tmp_path / "empty.cpp"
    source.write_text(EMPTY)
    stale = stale_lock(own)
    env = {"TORCH_EXTENSIONS_DIR": str(own)}
    with start_ranks(build_an_empty_adam, 2, source, env=env) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
        output = ranks.output()
    assert not stale.exists()
    assert list(stale.parent.glob("*.so"))
    # one rank compiles and says so; the other loads the result
    assert output.count(f"compiling DeepSpeed's FusedAdam into {stale.parent}") == 1
    assert output.count("  compiled in ") == 1
    assert "  still compiling after 1 s" in output


@pytest.mark.dist
def test_a_signal_ends_a_compilation_at_once(tmp_path: Path) -> None:
    own, source = tmp_path / "extensions", tmp_path / "empty.cpp"
    source.write_text(EMPTY)
    env = {"TORCH_EXTENSIONS_DIR": str(own)}
    with start_ranks(build_an_empty_adam, 1, source, env=env) as ranks:
        (pid,) = ranks.pids
        rank = psutil.Process(pid)
        compilers = wait_until(lambda: rank.children(recursive=True), 60, "a compiler runs")
        rank.send_signal(signal.SIGTERM)
        assert ranks.wait(10) == [128 + signal.SIGTERM]
        assert "Traceback" not in ranks.output()
        psutil.wait_procs(compilers, timeout=10)
        assert not any(compiler.is_running() for compiler in compilers)


@pytest.mark.slow  # compiles DeepSpeed's own Adam
@pytest.mark.dist
@pytest.mark.timeout(1000)
def test_a_stale_lock_blocks_no_run(tiny: Tiny, tmp_path: Path) -> None:
    own = tmp_path / "extensions"
    stale = stale_lock(own)
    flags = tiny.flags("run", "--steps", 1, ds=tiny.ds("compiled", optimizer=ADAM))
    with Launch(["python"], *flags, env={"TORCH_EXTENSIONS_DIR": str(own)}) as launch:
        assert launch.wait(990) == 0, launch.output()
    assert not stale.exists()
    assert list(stale.parent.glob("*.so"))


@pytest.mark.dist
def test_the_shipped_optimizer_needs_no_compiler(tiny: Tiny, tmp_path: Path) -> None:
    own = tmp_path / "extensions"
    env = {"TORCH_EXTENSIONS_DIR": str(own), "CXX": "/bin/false"}
    with Launch(["python"], *tiny.flags("run", "--steps", 1), env=env) as launch:
        assert launch.wait(90) == 0, launch.output()
    assert not own.exists()
