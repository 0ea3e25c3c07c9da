"""Layouts match the oracle: losses, gradient norms, every parameter's gradient, 6 steps.

`test_all_layouts` (slow) has the rest. Measured, fp32: losses 1.2e-7, norms 1.3e-7,
gradients 8.4e-7 of their norm.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest

from tests.parity.comparing import HALF, compared_run, verdicts
from tests.ranks import run_ranks

LLAMA = {
    "model.norm": "rmsnorm",
    "model.position": "rotary",
    "model.activation": "swiglu",
    "model.tied_head": False,
    "model.bias": False,
    "model.qk_norm": True,
    "model.n_head": 4,
    "model.n_kv_head": 2,
    "model.d_head": 80,
}
POST_NORM = {
    "model.norm_place": "post",
    "model.position": "sinusoidal",
    "model.activation": "relu2",
}
UNEVEN = {"model.d_model": 65, "model.d_head": 16, "data.seq_len": 31}  # 65 x 31 is odd
DROPOUT = {"model.dropout": 0.2}
# one of four blocks, the third, sees beyond 5 tokens
WINDOW = {
    "model.window": 5,
    "model.window_pattern": 3,
    "model.z_loss": 0.01,
    "model.logit_softcap": 1.0,
    "model.embedding_scale": 8.0,
    "model.init_residual": "zero",
}
# its logits, and with them the gradients, are a quarter as large
MUP = {"model.mup_base": 16, "model.mup_base_d_head": 4}
APART = {"data.document_mask": True, "data.reset_positions": True}
PARTITIONED = {"activation_checkpointing": {"partition_activations": True}}
RUNS_OF_TWO = {"activation_checkpointing": {"number_checkpoints": 2}}
CPU = {"device": "cpu"}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}}
OFFLOAD_ALL = {"zero_optimization": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}}


class Case(NamedTuple):
    """Layouts of one model and DeepSpeed JSON, compared in one set of processes."""

    ranks: int
    layouts: str
    settings: dict[str, Any] = {}
    deepspeed: dict[str, Any] = {}
    norm: float = math.inf
    """Largest relative difference of a gradient norm, where it is below the bound of all cases."""


CASES = {
    "two ranks": Case(
        2,
        "zero0 zero1 tp2zero0 tp2zero2 tp2spzero1 cp2zero0 cp2zero3 pp2zero0 pp2zero1ckpt",
        norm=1e-6,
    ),
    "four ranks": Case(
        4,
        "tp2pp2spzero0 tp2pp2zero1 tp2cp2spzero2ckpt tp2spzero3 pp2cp2zero1 tp4",
        norm=1e-6,
    ),
    "dropout": Case(4, "tp2pp2sp tp2cp2spzero2 pp4ckpt zero3ckpt", DROPOUT),
    "llama, heads of 80, untied": Case(4, "tp2pp2sp tp2spzero3ckpt cp2 tp2zero0", LLAMA),
    "vocabulary 50257": Case(4, "tp4 tp4spzero0", {"model.vocab_size": 50257, "model.n_layer": 1}),
    "five blocks": Case(2, "pp2 pp2zero0ckpt", {"model.n_layer": 5}),
    "stages by hand": Case(2, "pp2", {"model.n_layer": 5, "parallel.partition": "1,4"}),
    "post-norm": Case(4, "tp2pp2sp tp2cp2", POST_NORM),
    "bf16": Case(4, "tp2pp2sp tp2cp2spzero2 tp2zero3ckpt pp2zero1 tp4spzero1", {}, HALF),
    "partitioned": Case(2, "tp2zero1", {**DROPOUT, "parallel.tp": 2}, PARTITIONED),
    "runs of two blocks": Case(2, "tp2spzero2 pp2", DROPOUT, RUNS_OF_TWO),
    "uneven parts": Case(4, "tp2pp2 tp2pp2zero0", UNEVEN),
    "documents apart": Case(4, "tp2pp2sp tp2cp2spzero2ckpt pp2cp2zero1ckpt zero3", APART),
    "documents apart, rotary": Case(2, "tp2spzero3ckpt cp2 pp2", {**LLAMA, **APART}),
    "documents apart, dropout, bf16": Case(2, "tp2sp pp2ckpt", {**DROPOUT, **APART}, HALF),
    "window, loss terms": Case(2, "tp2sp pp2ckpt cp2zero3", WINDOW),
    "window, loss terms, four ranks": Case(4, "tp2pp2sp tp2cp2spzero2ckpt", WINDOW),
    "window, documents, bf16": Case(2, "tp2sp cp2zero3", {**WINDOW, **APART, **LLAMA}, HALF),
    "muP": Case(2, "tp2sp pp2ckpt cp2zero3", MUP, {"gradient_clipping": 0.1}),
    "offload": Case(2, "tp2sp cp2", {}, OFFLOAD),
    "offload of all": Case(2, "tp2 cp2", {}, OFFLOAD_ALL),
}
SLOW = (
    "dropout",
    "vocabulary 50257",
    "documents apart",
    "window, documents, bf16",
    "window, loss terms, four ranks",
    "documents apart, rotary",
    "post-norm",
    "llama, heads of 80, untied",
)


@pytest.mark.dist
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, c in CASES.items()
    ],
)
def test_the_same_run(case):
    what = compared_run(case.ranks, case.settings, case.deepspeed)
    names = case.layouts.split()
    found = run_ranks(verdicts, case.ranks, what, names, timeout_s=170)[0]
    assert {name: v.departs for name, v in found.items()} == dict.fromkeys(names)
    assert {name: v.norm for name, v in found.items() if v.norm > case.norm} == {}
