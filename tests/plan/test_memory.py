"""Predicted weights, gradients, states and the table: against numel, and by hand."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import pytest
from rich.console import Console

from fgpt.model.count import n_params
from fgpt.model.gpt import GPT
from fgpt.plan.memory import rank_params, render_stages, stage_table, state_bytes
from tests.plan.conftest import BF16, FP32_SUMS, Plan, zero

VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied_head": False, "position": "rotary"},
    "post": {"norm_place": "post", "activation": "swiglu"},
    "groups": {"n_kv_head": 2, "qk_norm": True, "norm": "rmsnorm", "bias": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_rank_holds_the_model(variant: str, plan: Plan) -> None:
    resolved = plan(**VARIANTS[variant])
    (row,) = stage_table(resolved)
    model = GPT(resolved.run.model)
    assert row.params == sum(p.numel() for p in model.parameters()) == n_params(resolved.run.model)
    assert (row.first, row.last, row.in_flight) == ("embedding", "head", 1)


@pytest.mark.parametrize("partition", ["parameters", "1,3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_hold_their_layers(variant: str, partition: str, plan: Plan) -> None:
    """Both ends of a tied model hold the matrix; a layer counts each parameter once."""
    flags = ["--pp", "2", "--set", f"parallel.partition={partition}"]
    resolved = plan(*flags, world=2, **VARIANTS[variant])
    layers = GPT(resolved.run.model).layers()
    names = list(layers)
    for row in stage_table(resolved):
        own = names[names.index(row.first) : names.index(row.last) + 1]
        parameters = {p for name in own for p in layers[name].parameters()}
        matrix = {layers["head"].weight} if "head" in own else set()
        assert row.params == sum(p.numel() for p in parameters | matrix)


def test_tensor_parallel_parameters_by_hand(plan: Plan) -> None:
    """d_model 16, half of 4 heads of 4, half of d_ff 64, 51 of 101 rows of the vocabulary."""
    resolved = plan("--tp", "2", world=2)
    matrices = 24 * 16 + 16 * 8 + 32 * 16 + 16 * 32  # qkv, out, up, down
    biases = 24 + 16 + 32 + 16  # those of out and down are whole
    norms = 4 * 16
    embedding = 51 * 16 + 32 * 16
    block = matrices + biases + norms
    assert rank_params(resolved, ["blocks.0"]) == block
    assert rank_params(resolved, ["embedding"]) == embedding
    (row,) = stage_table(resolved)
    assert row.params == embedding + 4 * block + 2 * 16
    untied = plan("--tp", "2", world=2, tied_head=False)
    assert stage_table(untied)[0].params == row.params + 51 * 16


@pytest.mark.parametrize(
    ("ds", "weights", "gradients", "optimizer"),
    [
        # bytes for a parameter on 4 data-parallel ranks; see the table in ds_configs/README.md
        (zero(0), 4, 4, 8),
        (zero(1), 4, 4, 12 / 4),
        (zero(2), 4, 4 / 4, 12 / 4),
        (zero(3), 4 / 4, 4 / 4, 12 / 4),
        (zero(1) | BF16, 2, 2, 12 / 4),
        (zero(1) | BF16 | FP32_SUMS, 2, 6, 12 / 4),
        (zero(2) | BF16 | FP32_SUMS, 2, 4 / 4, 12 / 4),
        (zero(3) | BF16, 2 / 4, 2 / 4, 12 / 4),
        (zero(2) | {"fp16": {"enabled": True}}, 2, 2 / 4, 12 / 4),
        (zero(1) | {"fp16": {"enabled": True}} | FP32_SUMS, 2, 4, 12 / 4),
        (
            {"zero_optimization": {"stage": 0}, "optimizer": {"type": "SGD", "params": None}},
            4,
            4,
            0,
        ),
    ],
)
def test_states_by_hand(
    ds: dict[str, Any], weights: float, gradients: float, optimizer: float, plan: Plan
) -> None:
    states = state_bytes(plan(world=4, ds=ds))
    assert (states.weights, states.gradients, states.optimizer) == (weights, gradients, optimizer)
    assert states.host == 0


def test_one_gradient_needs_no_float32_sum(plan: Plan) -> None:
    ds = zero(1) | BF16 | FP32_SUMS
    assert state_bytes(plan(ds=ds)).gradients == 2
    assert state_bytes(plan(ds=ds | {"gradient_accumulation_steps": 2})).gradients == 6


def test_context_parallel_ranks_share_the_states(plan: Plan) -> None:
    assert state_bytes(plan("--cp", "2", world=8, ds=zero(3))).optimizer == Fraction(12, 8)
    assert state_bytes(plan("--tp", "2", world=8, ds=zero(3))).optimizer == Fraction(12, 4)


@pytest.mark.parametrize(
    ("stage", "gradients", "host"), [(1, 4, 16 / 2), (2, 0, 16 / 2), (3, 0, 16 / 2)]
)
def test_offloaded_states(stage: int, gradients: float, host: float, plan: Plan) -> None:
    ds = zero(stage, offload_optimizer={"device": "cpu"})
    states = state_bytes(plan(world=2, ds=ds))
    assert (states.gradients, states.optimizer, states.host) == (gradients, 0, host)


def test_offloaded_weights(plan: Plan) -> None:
    both = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    states = state_bytes(plan(world=2, ds=zero(3, **both)))
    assert (states.weights, states.host) == (0, (16 + 4) / 2)


@pytest.mark.parametrize(
    ("accumulation", "expected"), [(1, [1, 1, 1, 1]), (2, [2, 2, 2, 1]), (8, [4, 3, 2, 1])]
)
def test_micro_batches_in_flight(accumulation: int, expected: list[int], plan: Plan) -> None:
    ds = {"gradient_accumulation_steps": accumulation}
    rows = stage_table(plan("--pp", "4", world=4, ds=ds))
    assert [row.in_flight for row in rows] == expected


def test_the_table(plan: Plan) -> None:
    output = io.StringIO()
    ds = zero(1, offload_optimizer={"device": "cpu"})
    rows = stage_table(plan("--pp", "2", world=2, ds=ds))
    render_stages(rows, Console(file=output, width=80))  # as under a launcher
    lines = output.getvalue().splitlines()
    assert lines[1].split("  ")[-1].strip() == "on the host"
    for row, line in zip(rows, lines[2:4], strict=True):
        cells = line.split()
        assert cells[:5] == [str(row.stage), row.first, "..", row.last, f"{row.params:,}"]
        shown = [row.weights, row.gradients, row.optimizer, row.activations, row.total, row.host]
        assert cells[5:] == [f"{size / 2**20:,.1f}" for size in shown]
    assert rows[0].total == rows[0].weights + rows[0].gradients + rows[0].activations
