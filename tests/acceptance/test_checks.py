"""The checks on a CPU, with its own kernels as stand-ins; and that they fail where they must."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.acceptance import engines, kernels, training
from fgpt.acceptance.check import CHECKS, NEEDS_GPU, Findings
from fgpt.acceptance.report import read_lines
from fgpt.acceptance.run import run_gpu_check
from fgpt.model.mask import AttentionMask
from tests.ranks import ROOT


def findings(folder: Path, data: Path | None = None) -> Findings:
    return Findings("cpu", folder, data or folder)


@pytest.mark.parametrize(
    ("check", "figures", "skipped"),
    [(kernels.check_attention, 4, 5), (kernels.check_masks, 12, 0), (kernels.check_dropout, 4, 1)],
    ids=["attention", "masks", "dropout"],
)
def test_kernels(check: Any, figures: int, skipped: int, tmp_path: Path) -> None:
    found = findings(tmp_path)
    check(found)
    assert found.failures == []
    assert len(found.figures) == figures and all("at_most" in f for f in found.figures.values())
    assert list(found.not_run.values()) == [NEEDS_GPU] * skipped


def test_a_wrong_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that attends to one key more than the mask allows."""
    right = kernels.sdpa_attention

    def wrong(q: Any, k: Any, v: Any, mask: AttentionMask, dropout: Any) -> Any:
        window = None if mask.window is None else mask.window + 1
        return right(q, k, v, AttentionMask(mask.document_begins, window), dropout)

    monkeypatch.setattr(kernels, "sdpa_attention", wrong)
    found = findings(tmp_path)
    kernels.check_masks(found)
    assert len(found.failures) == 8  # of 12: those with a window


@pytest.mark.slow
def test_a_wrong_rate_exceeds_the_bounds(tmp_path: Path) -> None:
    """In every precision, though a GPU's bounds are wider than those between engines on a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        optimizer = copy.deepcopy(engines.JSON["optimizer"])
        optimizer["params"]["lr"] *= 1.2
        wanted, wrong = engines.plain_run({}), engines.plain_run({"optimizer": optimizer})
    finally:
        torch.set_num_threads(threads)
    for precision in engines.BOUNDS:
        found = findings(tmp_path)
        engines.compare(found, "itself", wanted, wanted, precision)
        assert found.failures == []
        engines.compare(found, "wrong", wrong, wanted, precision)
        assert any("wrong: weights" in failure for failure in found.failures), precision


@pytest.mark.slow
def test_a_run_without_the_guard_fails_the_nan_check(tmp_path: Path, small_data: Path) -> None:
    found = findings(tmp_path, small_data)
    run = training.Training(found, "run", "--steps", 3, faults=("--nan-from", 50))
    run.require_code(found, 1)
    assert found.failures[0].startswith("run: exit code 0, not 1: ")
    assert [record["skipped"] for record in run.records()] == [False] * 3


def test_a_check_through_the_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shown: list[str] = []
    out = tmp_path / "report.jsonl"
    code = run_gpu_check(out, device="cpu", only=["dropout"], show=shown.append)
    header, line = read_lines(out)
    assert code == 0, line
    assert header["device"] == "cpu" and header["versions"]["torch"] == torch.__version__
    assert line["check"] == "dropout" and line["state"] == "passed"
    assert shown[-1].startswith("0 failed, 0 without time")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stand_in_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = tmp_path / "report.jsonl"
    code = run_gpu_check(out, device="cpu", show=lambda line: None)
    lines = read_lines(out)[1:]
    assert code == 0, [line for line in lines if line["error"]]
    assert [line["check"] for line in lines] == [check.name for check in CHECKS]
    gpu_only = [line["check"] for line in lines if line["not_run"].get("all") == NEEDS_GPU]
    assert gpu_only == ["engines-fp16"]
