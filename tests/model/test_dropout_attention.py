"""The Triton kernel in Triton's interpreter, on a CPU; and compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ROOT

pytest.importorskip("triton")


def output_of(*arguments: str, **environ: str) -> str:
    """Run Python with these arguments and variables; return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    module = "tests.model.interpreted_attention"
    found: dict[str, Any] = json.loads(output_of("-m", module, TRITON_INTERPRET="1"))
    return found


def test_its_slow_twin(interpreted: dict[str, Any]) -> None:
    """Output and gradients: tiles of which windows and documents hide all for some queries, too."""
    errors = interpreted["errors"]
    assert len(errors) == 7 and all(len(four) == 4 for four in errors.values())
    for name, four in errors.items():
        assert max(four) < (2**-10 if name == "float16" else 3e-6), name


def test_the_seam(interpreted: dict[str, Any]) -> None:
    """`sdpa_attention` uses the dropout's kernel, which saves no [T, T] tensor."""
    seam = interpreted["seam"]
    assert "fgpt_dropout_attention" in seam["kernel"]
    assert seam["error"] < 1e-5 and seam["saved"] == 1.0


@pytest.mark.parametrize(
    ("capability", "dtype", "d_head", "masks"),
    [
        (90, "bf16", 64, "none"),
        *(
            pytest.param(90, "bf16", 64, masks, marks=pytest.mark.slow)
            for masks in ("window", "documents", "window documents")
        ),
        *(
            pytest.param(capability, dtype, d_head, "window documents", marks=pytest.mark.slow)
            for capability in (80, 90)
            for dtype in ("bf16", "fp16", "fp32")
            for d_head in (64, 128, 256)
        ),
    ],
)
def test_it_compiles_for_gpus(
    capability: int, dtype: str, d_head: int, masks: str, tmp_path: Path
) -> None:
    """To machine code, with tiles that fit into the shared memory of small ones."""
    module = "tests.model.compiled_attention"
    arguments = ["-m", module, str(capability), dtype, str(d_head), masks]
    kernels = json.loads(output_of(*arguments, TRITON_CACHE_DIR=str(tmp_path)))
    assert len(kernels) == 3
    for shared_bytes, code_bytes in kernels:
        assert shared_bytes <= 99 * 1024 and code_bytes > 1000
