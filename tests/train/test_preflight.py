"""The checks before the first step: silent on a healthy machine, one line for each fault."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

from fgpt.config.resolve import resolve
from fgpt.distributed.launch import World
from fgpt.doctor.clock import measure_clocks
from fgpt.engine import speed
from fgpt.errors import LaunchError
from fgpt.train import preflight as module
from fgpt.train.startup import RunContext
from tests.ranks import run_ranks
from tests.run_flags import parse_run_flags
from tests.tiny import Tiny

pytestmark = pytest.mark.dist


def said(world: World, flags: list[str], resume: str = "none", device: str = "cpu") -> list[str]:
    """What `preflight` prints; its error as the last line."""
    output = io.StringIO()
    console = Console(file=output, width=500, quiet=not world.is_rank0)
    resolved = resolve(parse_run_flags(flags), world=world.size, device=device)
    context = RunContext(resolved, world, torch.device("cpu"), console)
    try:
        module.preflight(context, resume)
    except LaunchError as error:
        output.write(f"{error}\n")
    return output.getvalue().splitlines()


def test_findings(tiny: Tiny) -> None:
    first, second = run_ranks(_find, 2, tiny.flags("run"))
    assert first["healthy"] == second["healthy"] == []
    assert first["seconds"] < 0.2
    for what, name in (("code", "FGPT's code"), ("versions", "version of torch")):
        for found in (first, second):
            (line,) = found[what]
            assert line.startswith(f"{name} differs: rank 1: ") and "give every node" in line
    assert first["several"] == [
        "warning: open files (ulimit -n): 100, 2 ranks need 272 (rank 1) -> ulimit -n 272",
        "warning: clock: rank 1 is 30 s ahead of rank 0 -> synchronize the nodes' clocks (chrony,"
        " ntpd): logs and file times mislead",
    ]
    assert second["several"] == []  # rank 0 prints


def _find(world: World, flags: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    said(world, flags)  # imports, opens
    start = time.process_time()
    found["healthy"] = said(world, flags)
    found["seconds"] = time.process_time() - start
    node = World(world.rank, world.size, local_rank=0, local_size=1)
    own = f"{world.rank}" * 64
    with mock.patch.object(module, "code_hash", lambda: own):
        found["code"] = said(node, flags)
        # one rank of a node reads the files
        assert said(world, flags) == []
    torch_version = {"torch": f"2.1{world.rank}.0"}
    with mock.patch.object(module, "versions", lambda: torch_version):
        found["versions"] = said(world, flags)
    facts = module.host_facts
    with (
        mock.patch.object(
            module,
            "measure_clocks",
            lambda device: measure_clocks(device, lambda: time.time() + 30.01 * world.rank),
        ),
        mock.patch.object(
            module,
            "host_facts",
            lambda kind: replace(facts(kind), open_files=100 if world.rank else 300),
        ),
    ):
        found["several"] = said(world, flags)
    return found


def test_the_disk_is_nearly_full(tiny: Tiny, one_rank: None, monkeypatch: Any) -> None:
    flags = tiny.flags("run")
    resolved = resolve(parse_run_flags(flags), world=1, device="cpu")
    one, three = module.checkpoint_bytes(resolved), module.kept_bytes(resolved)
    assert three == 3 * one  # checkpoint.keep 2, and the one that is being written
    monkeypatch.setattr(module, "free_bytes", lambda path: three - 1)
    (line,) = said(World(), flags)
    assert line.startswith("warning: free disk: ") and "the run's checkpoints need" in line
    # a resumed run has one of them already
    (tiny.path("run") / "checkpoints" / "step_00000002").mkdir(parents=True)
    assert said(World(), flags, resume="auto") == []
    assert len(said(World(), flags)) == 1


def test_blocks_without_a_compiler(
    tiny: Tiny, one_rank: None, tmp_path: Path, monkeypatch: Any
) -> None:
    """A GPU's run on a machine without one: the line, and eager blocks (F5)."""
    flags = tiny.flags("run")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (line,) = said(World(), flags, device="cuda")
    assert line == (
        "slow path: compiled blocks: off because of no C compiler (gcc or clang): install gcc, or"
        " set CC"
    )
    flags.append("--set=model.dropout=0.1")
    (line,) = said(World(), flags, device="cuda")
    assert line.startswith("slow path: Triton's attention with dropout: off because of no C")
    assert said(World(), [*flags, "--set=model.dropout=0"], device="cpu") == []
    assert speed.missing_compiler("cpu") is not None
