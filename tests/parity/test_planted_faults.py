"""Parity detects and locates the kinds of errors that trainers have had.

Each error is planted into an engine before training; the same layout without it is the control.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch.nn.functional as F

from fgpt.model.context import BatchContext
from tests.parity.comparing import HALF, compared_run, verdicts
from tests.ranks import run_ranks

STEPS = 2


def wrong_scale(factor, engine):
    """One weight's gradient is multiplied by a factor."""
    weight = engine.parameters().get("blocks.1.mlp.up.weight")
    if weight is not None:  # on one stage of a pipeline
        weight.register_hook(lambda gradient: gradient * factor)


def lost_output_sum(engine):
    """A row-split layer keeps its part of the output for itself."""
    layer = engine.model.blocks[2].mlp.down
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)


def lost_input_gradient_sum(engine):
    """A column-split layer's input gradient is each rank's part of it."""
    engine.model.blocks[2].attention.project_input = lambda x, *layers: [
        layer(x) for layer in layers
    ]


def lost_norm_sum(engine):
    """Under sequence parallelism a norm's gradient covers this rank's tokens only."""
    engine.parameters()["blocks.1.attention_norm.weight"]._backward_hooks.clear()


def unmarked(engine):
    """DeepSpeed takes a sharded weight for a replicated one and counts one shard in the norm."""
    engine.parameters()["head.weight"].model_parallel = False


def wrong_on_one_rank(engine):
    """Replicated values differ between tensor ranks; those of the first are right."""
    if engine.groups.coordinates.tensor == 1:
        engine.parameters()["final_norm.weight"].register_hook(lambda gradient: gradient * 1.5)


def untold(field, engine):
    """The model gets no documents, or no positions, on one rank."""
    context_of = engine._batch_context
    if engine.world.rank == 1:
        engine._batch_context = lambda *batch: context_of(*batch)._replace(
            **{field: getattr(BatchContext(), field)}
        )


def without_and_with(world, what, layout, fault):
    """Return the layout's verdict without and with the error."""
    return [verdicts(world, what, [layout], change)[layout] for change in (None, fault)]


def found(layout, fault, deepspeed=None, settings=None):
    what = compared_run(2, {"model.tied_head": False, **(settings or {})}, deepspeed, steps=STEPS)
    control, faulty = run_ranks(without_and_with, 2, what, layout, fault)[0]
    assert control.departs is None
    return faulty.departures


@pytest.mark.dist
@pytest.mark.timeout(120)
@pytest.mark.parametrize("layout", ["tp2zero0", "tp2zero2", "tp2zero3", "pp2zero1", "cp2"])
def test_a_gradient_of_the_wrong_scale_is_named(layout):
    departures = found(layout, partial(wrong_scale, 1.001))
    assert departures["gradient"].startswith(
        "gradient of blocks.1.mlp.up.weight at step 1: 1.0e-03"
    )
    assert "loss" not in departures


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_a_lost_sum_in_the_forward_pass_shows_in_the_first_loss():
    assert found("tp2", lost_output_sum)["loss"].startswith("loss at step 1: ")


@pytest.mark.dist
@pytest.mark.timeout(120)
@pytest.mark.parametrize("deepspeed", [{}, HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("layout", "fault", "begins"),
    [
        ("tp2", lost_input_gradient_sum, "blocks.2.attention_norm.bias"),
        ("tp2sp", lost_norm_sum, "blocks.1.attention_norm.weight"),
    ],
)
def test_a_lost_sum_in_the_backward_pass_is_named_where_it_begins(layout, fault, begins, deepspeed):
    departures = found(layout, fault, deepspeed)
    assert departures["gradient"].startswith(f"gradient of {begins} at step 1")


@pytest.mark.dist
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("layout", "field"),
    [("zero1", "mask"), ("pp2", "mask"), ("tp2sp", "mask"), ("cp2", "positions")],
)
def test_a_rank_that_was_not_told_of_documents(layout, field):
    apart = {"data.document_mask": True, "data.reset_positions": True}
    assert found(layout, partial(untold, field), settings=apart)["loss"].startswith(
        "loss at step 1"
    )


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_bf16_bounds_are_below_a_tenth_of_a_gradient():
    departures = found("tp2zero2", partial(wrong_scale, 1.1), HALF)
    assert departures["gradient"].startswith("gradient of blocks.1.mlp.up.weight at step 1")


@pytest.mark.dist
@pytest.mark.timeout(120)
@pytest.mark.parametrize("layout", ["tp2zero0", "tp2zero1"])
def test_a_norm_that_misses_a_part_is_caught(layout):
    assert "norm" in found(layout, unmarked)


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_copies_that_part_are_caught_though_the_first_one_is_right():
    departures = found("tp2zero1", wrong_on_one_rank)
    assert departures["copies"].startswith("copies of final_norm.weight at step 1")
    assert "loss" not in departures
