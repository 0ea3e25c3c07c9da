"""fgpt parity --measure: peak memory of known tensors, and of a layout beside its prediction."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fgpt.parity.plan_check import MIB, MeasuredLayout, peak_allocation
from tests.ranks import ROOT


def test_the_peak_of_known_tensors() -> None:
    """4 MiB, then 8 MiB beside them, then 2 MiB after the first are gone."""
    with peak_allocation(torch.device("cpu")) as peak:
        first = torch.ones(MIB)
        second = torch.ones(2 * MIB)
        del first
        third = torch.ones(MIB // 2)
        del second, third
    assert 12 * MIB <= peak.bytes < 12.1 * MIB


def test_the_error_of_the_worst_stage() -> None:
    result = MeasuredLayout("pp2", "", [100, 100], [101, 90], [1.0])
    assert result.memory_error == pytest.approx(-0.1)


def test_a_layout_is_measured_beside_its_prediction(tmp_path: Path) -> None:
    out = tmp_path / "measured.jsonl"
    flags = ["--model", "tiny", "--set", "model.n_layer=2", "--ranks", "2", "--layouts", "tp2"]
    flags += ["--steps", "2", "--global_batch", "4", "--micro_batch", "2", "--out", str(out)]
    command = [sys.executable, "-m", "fgpt.cli", "parity", "--measure", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "tp2" in done.stdout and "predicted MiB" in done.stdout
    (record,) = (json.loads(line) for line in out.read_text().splitlines())
    (measured,), (predicted,) = record["measured_bytes"], record["predicted_bytes"]
    assert measured == pytest.approx(predicted, rel=0.1)
    assert len(record["step_s"]) == 2 and record["terms"][0]["weights"] > 0
