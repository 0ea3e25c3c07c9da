"""`fgpt soak`: a short one; what it draws, and what it notices."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fgpt.cli import main
from fgpt.parity.soak_faults import KINDS, MAX_STEPS, MIN_STEPS, draw_faults, draw_layouts
from fgpt.parity.soak_run import SAVE_EVERY, Outcome, Segment, SoakRecord
from fgpt.parity.soak_verdict import RunResult, SoakVerdict, read_samples
from tests.ranks import ROOT, wait_until

RESULT = RunResult("w", "s", "i", (5.0, 4.0))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
def test_a_short_soak(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soak.json"
    flags = ["--faults", "4", "--seed", "3", "--data", str(small_data), "--out", str(out)]
    code = main(["soak", *flags])
    said = capsys.readouterr().out
    assert code == 0, said
    report = json.loads(out.read_text())
    assert len(report["faults"]) == 4 and report["equal"] and not report["departures"]
    assert report["sha256"]["faulty"] == report["sha256"]["clean"]
    assert len({segment["layout"] for segment in report["segments"]}) > 1
    assert "4 of 4 faults" in said and said.endswith("equal to the clean run, bit for bit\n")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_ctrl_c_leaves_no_process(small_data: Path) -> None:
    command = [sys.executable, "-m", "fgpt.cli", "soak", "--data", str(small_data)]
    environment = os.environ | {"FGPT_TEST_SOAK": str(small_data), "PYTHONPATH": str(ROOT)}

    def heed_ctrl_c() -> None:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    soak = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=heed_ctrl_c
    )

    def ours() -> list[psutil.Process]:
        return [p for p in psutil.process_iter() if _has(p, str(small_data))]

    try:
        wait_until(lambda: len(ours()) >= 4, 120, "the launcher and two ranks")
        soak.send_signal(signal.SIGINT)
        assert soak.wait(60) == 130
        wait_until(lambda: not ours(), 10, "no process is left")
    finally:
        for process in ours():
            process.kill()


def _has(process: psutil.Process, value: str) -> bool:
    try:
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return not is_zombie and process.environ().get("FGPT_TEST_SOAK") == value
    except psutil.Error:
        return False


def test_draws() -> None:
    faults = draw_faults(2 * len(KINDS), 3, seed=5)
    assert faults == draw_faults(2 * len(KINDS), 3, seed=5) != draw_faults(22, 3, seed=6)
    assert all([f.kind for f in faults].count(kind) == 2 for kind in KINDS)
    for fault in faults:
        assert MIN_STEPS <= fault.after_steps <= MAX_STEPS and 0 <= fault.rank < 3
        at = fault.at_step(8, SAVE_EVERY)
        assert 0 <= at - 8 - fault.after_steps < SAVE_EVERY
        assert at % SAVE_EVERY == 0 or not fault.kind.in_save
        point, rank, step, action = fault.variable(at).split(":")
        assert (point in fault.kind.points) and (rank, step) == (str(fault.rank), str(at))
        assert rank == "0" or point not in ("before_rename", "before_latest")
    layouts = draw_layouts(20, ("zero1", "tp2", "pp2"), seed=5)
    assert all(a != b for a, b in zip(layouts, layouts[1:], strict=False))
    assert draw_layouts(3, ("zero2",), seed=5) == ["zero2"] * 3


def test_segments_are_those_of_the_finished_run() -> None:
    record = SoakRecord()
    for layout, begin in [("a", 0), ("b", 8), ("c", 8), ("c", 16), ("d", 12), ("d", 20), ("a", 0)]:
        record.add_segment(Segment(layout, begin))
        if (layout, begin) == ("d", 20):
            assert record.segments == [Segment("a", 0), Segment("c", 8), Segment("d", 12)]
    assert record.segments == [Segment("a", 0)]


def test_samples_are_those_of_the_last_start(tmp_path: Path) -> None:
    files = {
        "faulty_000_0": '[1, 0, [[0, "a"], [1, "b"]]]\n[2, 0, [[4, "x"]]]\n[3, 0, [[8, "tor',
        "faulty_000_1": '[1, 1, [[2, "c"], [3, "d"]]]\n',
        "faulty_001_0": '[2, 0, [[5, "f"], [4, "e"]]]\n',
        "faulty_001_1": '[2, 0, [[5, "f"], [4, "e"]]]\n',  # another tensor rank
    }
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert read_samples(sorted(tmp_path.iterdir())) == {
        1: [(0, "a"), (1, "b"), (2, "c"), (3, "d")],
        2: [(4, "e"), (5, "f")],
    }


@pytest.mark.parametrize(
    ("faulty", "outcome", "says"),
    [
        (RESULT, Outcome("f", "zero1", outlived_s=9.0), None),
        (replace(RESULT, weights="x"), None, "weights differ"),
        (replace(RESULT, states="x"), None, "states differ"),
        (replace(RESULT, samples="x"), None, "samples differ"),
        (replace(RESULT, losses=(5.0, 4.1)), None, "the loss of step 2 differs"),
        (replace(RESULT, losses=(5.0, float("nan"))), None, "the loss of step 2 differs"),
        (replace(RESULT, departure="step 1 read"), None, "the faulty run: step 1 read"),
        (RESULT, Outcome("f", "zero1", problem="resumed from step 3, not 8"), "f: resumed from"),
        (RESULT, Outcome("f", "zero1", outlived_s=10.5), "outlived the launcher by 10.5 s"),
    ],
)
def test_what_departs(faulty: RunResult, outcome: Outcome | None, says: str | None) -> None:
    record = SoakRecord([] if outcome is None else [outcome], wall_s=60.0, useful_s=6.0)
    verdict = SoakVerdict(faulty, RESULT, record, planned=1)
    text = "\n".join(verdict.lines())
    if says is None:
        assert not verdict.departures and text.endswith("equal to the clean run, bit for bit")
    else:
        assert len(verdict.departures) == 1 and says in text and text.endswith("the runs differ")
    assert "goodput 10.0%" in text


def test_layouts_that_the_ranks_cannot_have(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, says in {
        ("--layouts", "tp4"): "--layouts tp4: --ranks 2 is not a multiple of 4",
        ("--layouts", "other"): "'other' is not a layout",
        ("--data", "/nonexistent"): "/nonexistent: not a prepared data set (no card.json)",
    }.items():
        t0 = time.monotonic()
        assert main(["soak", *flags]) == 2
        assert re.search(re.escape(says), capsys.readouterr().err)
        assert time.monotonic() - t0 < 10
