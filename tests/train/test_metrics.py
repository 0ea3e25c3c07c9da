"""metrics.jsonl and the console's lines agree, in the right units."""

from __future__ import annotations

import json
import math

import pytest

from fgpt.train.metrics import format_duration
from tests.ranks import run_ranks
from tests.tiny import Tiny, train_all


@pytest.mark.dist
def test_records(tiny: Tiny) -> None:
    ds = tiny.ds(gradient_accumulation_steps=2)
    flags = tiny.flags("run", "--set=train.log_every=2", "--set=eval.every=3", ds=ds)
    outcome = run_ranks(train_all, 2, [flags])[0][0]
    assert outcome.code == 0
    lines = [json.loads(x) for x in (tiny.path("run") / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "valid_loss" in r] == [0, 3, 6]
    records = [r for r in lines if "loss" in r]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    tokens = 2 * 2 * 2 * 32  # micro x accumulation x ranks x sequence
    for record in records:
        assert record["loss"] < 7 and record["grad_norm"] > 0 and not record["skipped"]
        assert 0 <= record["data_wait_s"] <= record["step_s"]
    first, second = records[:2]
    assert first["tokens_per_s"] == pytest.approx(tokens / first["step_s"])
    both_s = first["step_s"] + second["step_s"]
    assert second["tokens_per_s"] == pytest.approx(2 * tokens / both_s)
    waited_s = first["data_wait_s"] + second["data_wait_s"]
    assert second["data_wait"] == pytest.approx(waited_s / both_s)
    printed = [line for line in outcome.output.splitlines() if "tokens/s" in line and "lr" in line]
    assert [line.split()[1] for line in printed] == ["2/6", "4/6", "6/6"]
    assert f"loss {second['loss']:.4f}" in printed[0]
    assert f"  data {second['data_wait']:.1%}  " in printed[0]
    assert sum("valid loss" in line for line in outcome.output.splitlines()) == 3
    summary = json.loads((tiny.path("run") / "summary.json").read_text())
    assert summary["tokens"] == 6 * tokens and summary["valid_loss_first"] == pytest.approx(
        math.log(400), abs=0.3
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")]
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
