"""A pipeline trains the same run as the plain engine: losses, norms, weights, evaluation.

20 steps of a small model, global batch 8, clipping active, on 2 and 4 ranks; the bounds are those
of test_equality. Measured, relative: fp32 losses 1.7e-7, norms 1.4e-6, weights 2.0e-6; bf16 losses
4.5e-5, norms 1.2e-3, weights 4.9e-3.
"""

from __future__ import annotations

import pytest
import torch

from tests.engine.runs import TINY, several_runs, variant
from tests.engine.test_equality import assert_same, oracle
from tests.ranks import run_ranks

ZERO1 = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
RECOMPUTED = {"activation_checkpointing": {}}
OPTIMIZER = {"zero0": "AdamW", "zero1": "DeepSpeedZeroOptimizer", "bf16": "BF16_Optimizer"}
TABLE = "embedding.token.weight"
FIVE = {
    "model__n_layer": 5,
    "model__d_model": 128,
    "model__dropout": 0.1,
    "model__tied_head": False,
    "model__position": "rotary",
    "model__norm": "rmsnorm",
}


def look(engine):
    """Return properties of the stage."""
    held = engine.parameters()
    return {
        "optimizer": type(engine.deepspeed.optimizer).__name__,
        "held": list(held),
        "table": held[TABLE].detach().clone() if TABLE in held else None,
    }


def compare(tmp_path, configs, settings, *, ranks=2, pp=2, partition=None, precision="fp32"):
    """Compare named runs with the oracle; the first word of a name is the optimizer."""
    half = BF16 if precision == "bf16" else {}
    wanted = oracle(settings, **half)
    assert max(wanted["norm"]) > 1.0  # clipping is active
    assert wanted["loss"][-1] < wanted["loss"][0] - 0.5  # the loss falls
    layout = {"parallel__pp": pp} | ({"parallel__partition": partition} if partition else {})
    both = {
        name: (variant(**half, **changes), {**settings, **layout})
        for name, changes in configs.items()
    }
    found = run_ranks(several_runs, ranks, tmp_path / "ranks", both, look, timeout_s=170)
    for name in configs:
        runs = [of_rank[name] for of_rank in found]
        for key in ("loss", "norm", "eval", "skipped", "rate"):
            assert all(run[key] == runs[0][key] for run in runs), (name, key)
        for run in runs:
            assert_same(run, wanted, precision)
            assert run["optimizer"] == OPTIMIZER[name.split()[0]]
        tables = [run["table"] for run in runs if run["table"] is not None]
        assert all(torch.equal(tables[0], table) for table in tables), name
    return found


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_fp32(tmp_path):
    found = compare(tmp_path, {"zero0": {}, "zero1 recomputed": {**ZERO1, **RECOMPUTED}}, {})
    first, last = (rank["zero0"]["held"] for rank in found)
    assert "embedding.position.weight" in first and "embedding.position.weight" not in last
    assert set(first) & set(last) == {TABLE}  # the tied head
    assert set(first) | set(last) == set(found[0]["zero0"]["weights"])


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_five_layers_untied_with_dropout(tmp_path):
    """Masks depend on sample and position only, also when activations are recomputed."""
    configs = {"zero0 recomputed": RECOMPUTED, "zero1": ZERO1}
    found = compare(tmp_path, configs, FIVE, partition="3,2")
    assert not set(found[0]["zero1"]["held"]) & set(found[1]["zero1"]["held"])


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_bf16(tmp_path):
    configs = {"bf16": {**ZERO1, **FP32_GRADIENTS}}
    compare(tmp_path, configs, {}, precision="bf16")


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_two_stages_on_two_data_ranks(tmp_path):
    compare(tmp_path, {"zero1": ZERO1}, {"model__dropout": 0.1}, ranks=4)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_fp32_everything(tmp_path):
    configs = {
        "zero0 recomputed": RECOMPUTED,
        "zero0 recomputed in halves": {"activation_checkpointing": {"number_checkpoints": 2}},
        "zero1": ZERO1,
        "zero1 offload": {
            "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}
        },
        "zero1 one micro-batch": {**ZERO1, "train_micro_batch_size_per_gpu": 8},
        "zero1 eight micro-batches": {**ZERO1, "train_micro_batch_size_per_gpu": 1},
    }
    compare(tmp_path, configs, {})


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
@pytest.mark.parametrize("partition", ["parameters", "uniform", "type:Block", "1,4"])
def test_five_layers_divided_otherwise(tmp_path, partition):
    configs = {"zero0": {}, "zero1 recomputed": {**ZERO1, **RECOMPUTED}}
    compare(tmp_path, configs, FIVE, partition=partition)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_post_norm_without_biases(tmp_path):
    settings = {"model__norm_place": "post", "model__bias": False, "model__activation": "swiglu"}
    compare(tmp_path, {"zero0": {}, "zero1": ZERO1}, {**settings, **TINY})


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
@pytest.mark.parametrize("settings", [TINY, {**FIVE, **TINY}], ids=["tied", "untied, dropout"])
def test_bf16_everything(tmp_path, settings):
    configs = {
        "bf16": {**ZERO1, **FP32_GRADIENTS},
        "bf16 recomputed": {**ZERO1, **FP32_GRADIENTS, **RECOMPUTED},
    }
    compare(tmp_path, configs, settings, precision="bf16")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_four_ranks(tmp_path):
    configs = {"zero0": {}, "zero1 recomputed": {**ZERO1, **RECOMPUTED}}
    compare(tmp_path / "2x2", configs, {}, ranks=4)
    compare(tmp_path / "4", configs, {}, ranks=4, pp=4)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_bf16_on_four_ranks(tmp_path):
    configs = {"bf16": {**ZERO1, **FP32_GRADIENTS}}
    compare(tmp_path / "2x2", configs, {}, ranks=4, precision="bf16")
    compare(tmp_path / "4", configs, {}, ranks=4, pp=4, precision="bf16")
