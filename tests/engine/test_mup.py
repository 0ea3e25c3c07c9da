"""muP trains the same run on every engine: its learning rates differ by parameter group.

`tests/parity` has tensor, pipeline and context parallel.
"""

from __future__ import annotations

import pytest

from tests.engine.runs import several_runs, variant
from tests.engine.test_equality import ZERO, assert_same, oracle
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist

MUP = {"model__mup_base": 16, "model__mup_base_d_head": 4}
DECAY = {"type": "WarmupDecayLR", "params": {"total_num_steps": 20, "warmup_num_steps": 4}}


def compare(n, folder, cases, **common):
    """`cases`: name -> (ZeRO's name in ZERO, run settings)."""
    wanted = oracle(MUP, **common)
    both = {
        name: (variant(**common, zero_optimization=ZERO.get(zero, {"stage": 0})), {**MUP, **own})
        for name, (zero, own) in cases.items()
    }
    runs = run_ranks(several_runs, n, folder / "ranks", both, timeout_s=170)[0]
    for run in runs.values():
        assert_same(run, wanted, "fp32")
    assert wanted["loss"][-1] < wanted["loss"][0] - 0.1


@pytest.mark.timeout(180)
def test_two_ranks(tmp_path):
    cases = {
        "zero1": ("zero1", {}),
        "zero3-offload": ("zero3-offload", {}),
    }
    compare(2, tmp_path, cases, scheduler=DECAY)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_four_stages(tmp_path):
    """Two of them have no embedding: as many parameter groups as the others."""
    compare(4, tmp_path, {"pp4": ("zero1", {"parallel__pp": 4})})
