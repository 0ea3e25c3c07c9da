"""`fgpt bench watching`: both sides of a round are measured, and recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT


@pytest.mark.slow
@pytest.mark.dist
def test_a_round_has_both_sides(tmp_path: Path) -> None:
    out = tmp_path / "watching.jsonl"
    flags = ["--rounds", "2", "--steps", "2", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "fgpt.cli", "bench", "watching", *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "tiny, 2 ranks: a step takes " in done.stdout
    record = json.loads(out.read_text())
    assert record["measurement"] == "watching" and record["steps"] == 2
    assert len(record["pairs_s"]) == 2 and all(s > 0 for pair in record["pairs_s"] for s in pair)
