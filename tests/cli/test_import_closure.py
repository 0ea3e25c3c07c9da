"""How much of FGPT a training start imports: files with content, empty __init__.py left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.tiny import Tiny

MAX_FILES = 133
START = """
import runpy, sys
import fgpt.train.run as run

train = run.train
def train_and_list(*args, **kwargs):
    train(*args, **kwargs)
    names = sorted(name for name in sys.modules if name.partition(".")[0] == "fgpt")
    open(MODULES, "w").write(" ".join(names))

run.train = train_and_list
sys.argv = ["launchers/train.py", *FLAGS]
runpy.run_path("launchers/train.py", run_name="__main__")
"""


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_a_start_imports_what_training_needs(tiny: Tiny, tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    code = f"MODULES = {str(modules)!r}; FLAGS = {tiny.flags('run', '--steps', 1)!r}{START}"
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=100,
    )
    names = modules.read_text().split()
    assert "fgpt.engine.deepspeed.zero_engine" in names
    assert [name for name in names if name.startswith("fgpt.prepare")] == []
    files = [file for file in map(source_of, names) if file.read_text().strip()]
    assert len(files) <= MAX_FILES, "\n".join([f"{len(files)} files:", *map(str, files)])


def source_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
