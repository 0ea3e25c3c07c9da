"""The benchmark measures what it says: arithmetic by hand, and one real short run."""

from __future__ import annotations

import json
import sys
from subprocess import run

import pytest

from fgpt.bench.engines import base_json, variants
from fgpt.bench.measure import Timing, interleave
from fgpt.engine.base import StepResult


def test_relative_speed_is_paired_by_round():
    base, other = Timing((1.0, 2.0, 4.0)), Timing((2.0, 2.0, 2.0))
    assert base.median_s == 2.0
    assert base.spread() == (1.0, 4.0)
    # other's speed over base's, round by round: 0.5, 1, 2
    assert other.speed_relative_to(base) == (1.0, 0.5, 2.0)


class Counting:
    """An engine that writes down who was called when."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def train_batch(self, micro_batches):
        self.log.append(self.name)
        return StepResult(float(len(self.log)), 1.0, 0.0, False)


def test_engines_take_turns():
    import torch

    log: list[str] = []
    engines = {name: Counting(name, log) for name in "ab"}
    timings, losses = interleave(engines, [[], []], warmup=1, rounds=2, device=torch.device("cpu"))
    assert "".join(log) == "ab" + "aabb" + "bbaa"
    assert len(timings["a"].step_s) == 2
    assert losses == {"a": 10.0, "b": 8.0}


def test_variants_leave_out_what_the_rules_refuse():
    assert list(variants(base_json(4), "fp32", 1)) == [
        "plain", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3",
    ]  # fmt: skip
    assert list(variants(base_json(4), "bf16", 2)) == ["ZeRO-1", "ZeRO-2", "ZeRO-3"]


@pytest.mark.timeout(120)
def test_the_verb_records_every_engine(tmp_path):
    out = tmp_path / "bench.jsonl"
    flags = "--model seed-1m --precision fp32 --steps 1 --rounds 2 --warmup 1 --micro-batch 2"
    command = [sys.executable, "-m", "fgpt.cli", "bench", *flags.split(), "--out", str(out)]
    done = run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["engine"] for r in records] == ["plain", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    for record in records:
        assert record["loss"] == pytest.approx(records[0]["loss"], rel=1e-5)
        assert len(record["step_s"]) == 2 and min(record["step_s"]) > 0
        assert {"commit", "hardware", "versions", "command", "deepspeed"} <= record.keys()
    assert "x plain" in done.stdout
    assert "Warning" not in done.stderr
