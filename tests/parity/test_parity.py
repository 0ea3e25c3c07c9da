"""Layouts train the oracle's run: losses, gradient norms, every parameter's gradient, 10 steps.

What is not here is in `test_all_layouts` (slow). Measured, fp32: losses 1.3e-7, norms 4e-7,
gradients 8e-6 of their norm.
"""

from __future__ import annotations

import pytest

from tests.distributed import run_ranks
from tests.parity.comparing import HALF, subject, verdicts

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
RECOMPUTE = {"activation_checkpointing": {"number_checkpoints": 2}}


def agree(n, names, settings=None, deepspeed=None, timeout_s=170.0):
    what = subject(n, settings, deepspeed)
    found = run_ranks(verdicts, n, what, names, timeout_s=timeout_s)[0]
    assert {name: v.departs for name, v in found.items()} == dict.fromkeys(names)


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_two_ranks():
    names = [
        "tp2zero0",
        "tp2zero2",
        "tp2spzero1",
        "cp2zero0",
        "cp2zero3",
        "pp2zero0",
        "pp2zero1ckpt",
    ]
    agree(2, names)


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_four_ranks():
    names = [
        "tp2pp2spzero0",
        "tp2pp2zero1",
        "tp2cp2spzero2ckpt",
        "tp2spzero3",
        "pp2cp2zero1",
        "tp4",
    ]
    agree(4, names)


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_dropout_drops_the_same_in_every_layout():
    """Residual, embedding and attention dropout, kept and recomputed."""
    names = ["tp2pp2sp", "tp2cp2spzero2", "pp4ckpt", "zero3ckpt"]
    agree(4, names, {"model.dropout": 0.2})


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_rotary_rmsnorm_swiglu_grouped_heads_of_80_untied():
    names = ["tp2pp2sp", "tp2spzero3ckpt", "cp2", "tp2zero0"]
    agree(4, names, LLAMA)


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_a_vocabulary_of_50257_on_four_ranks():
    agree(4, ["tp4", "tp4spzero0"], {"model.vocab_size": 50257, "model.n_layer": 1})


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_five_layers_on_two_stages_and_stages_by_hand():
    agree(2, ["pp2", "pp2zero0ckpt"], {"model.n_layer": 5})
    agree(2, ["pp2"], {"model.n_layer": 5, "model.norm_place": "post"})


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_post_norm_sinusoidal_squared_relu():
    changes = {
        "model.norm_place": "post",
        "model.position": "sinusoidal",
        "model.activation": "relu2",
    }
    agree(4, ["tp2pp2sp", "tp2cp2"], changes)


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_bf16():
    names = ["tp2pp2sp", "tp2cp2spzero2", "tp2zero3ckpt", "pp2zero1", "tp4spzero1"]
    agree(4, names, deepspeed=HALF)


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_partitioned_and_grouped_recomputation():
    partitioned = {"activation_checkpointing": {"partition_activations": True}}
    agree(2, ["tp2zero1"], {"model.dropout": 0.1, "parallel.tp": 2}, partitioned)
    agree(2, ["tp2spzero2", "pp2"], {"model.dropout": 0.1}, RECOMPUTE)


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_uneven_parts_between_stages():
    """65 x 31 numbers do not divide by two tensor ranks."""
    odd = {"model.d_model": 65, "model.d_head": 16, "data.seq_len": 31}
    agree(4, ["tp2pp2", "tp2pp2zero0"], odd)


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_offload():
    cpu = {"device": "cpu"}
    agree(
        2, ["tp2sp", "cp2"], deepspeed={"zero_optimization": {"stage": 2, "offload_optimizer": cpu}}
    )
    both = {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}
    agree(2, ["tp2", "cp2"], deepspeed={"zero_optimization": both})
