"""The fast ways under real engines: the same run as the plain engine's with all of them off.

The bounds are test_equality's. Attention by blocks is taken for short sequences too.
"""

from __future__ import annotations

import pytest

from fgpt.model.kernels import blocked_attention
from tests.engine.runs import several_runs, variant
from tests.engine.test_equality import BF16, FP32_GRADIENTS, ZERO, assert_same, oracle, plain_run
from tests.ranks import run_ranks

SLOW = {"speed__loss": "plain", "speed__matmul": "torch", "speed__compile": "off"}
CHEAP = {"speed__recompute": "cheap"}


def eager_for_blocks(world, *args):
    """`several_runs` where no sequence is too short for attention by blocks."""
    blocked_attention.MIN_TOKENS = 1
    return several_runs(world, *args)


@pytest.mark.dist
@pytest.mark.timeout(180)
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_fast_and_slow_train_the_same_run(precision, tmp_path, monkeypatch):
    half = BF16 if precision == "bf16" else {}
    wanted = oracle(SLOW, **half)
    monkeypatch.setattr(blocked_attention, "MIN_TOKENS", 1)
    assert_same(plain_run(tmp_path / "fast", **half), wanted, precision)
    sums = FP32_GRADIENTS if half else {}
    configs = {
        name: (variant(zero_optimization=ZERO[name], **half, **more), settings)
        for name, more, settings in (("zero1", sums, {}), ("zero3", {}, {}))
    }
    for name in ("zero1", "zero3"):
        json, _ = configs[name]
        configs[f"{name}-cheap"] = ({**json, "activation_checkpointing": {}}, CHEAP)
    runs, _ = run_ranks(eager_for_blocks, 2, tmp_path / "ranks", configs, timeout_s=160)
    for name in configs:
        assert_same(runs[name], wanted, precision)
