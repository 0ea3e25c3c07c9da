"""A stage's layers and outputs, and the gradient norm over several stages."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fgpt.config.presets import PRESETS
from fgpt.engine.deepspeed.ops import init_communication
from fgpt.model.context import BatchContext
from fgpt.model.gpt import GPT
from fgpt.model.init import initial_value, initialize
from fgpt.parallel.grad_norm import global_grad_norm
from fgpt.parallel.pipeline.stage import PipelineStage, logical_parameters
from fgpt.parallel.topology import Grid, make_process_groups, record_process_groups
from tests.ranks import run_ranks

CONFIG = replace(
    PRESETS["tiny"], n_layer=3, d_model=32, n_head=2, n_kv_head=2, d_head=16, d_ff=64, vocab_size=50
)
IDS = torch.arange(24).reshape(2, 12)
BOUNDS = [0, 3, 6]  # embedding and two blocks; a block, the final norm and the head


def build(config):
    """Return the GPT on the meta device, and this rank's stage of it with initial values."""
    init_communication("cpu")
    with torch.device("meta"):
        gpt = GPT(config)
    with record_process_groups(timedelta(seconds=9)):
        stage = PipelineStage(gpt, BOUNDS, Grid(pp=2))
    with torch.no_grad():
        for name, parameter in logical_parameters(stage).items():
            parameter.copy_(initial_value(name, parameter.shape, config, seed=1))
    return gpt, stage


def describe(world, config):
    """Describe this rank's stage and run its part of a forward pass."""
    gpt, stage = build(config)
    stage.eval()
    stage.batch_contexts = iter([BatchContext()])
    between = torch.empty(*IDS.shape, config.d_model)
    if world.rank == 0:
        between = stage(IDS)
    dist.broadcast(between, 0)
    on_meta = [name for name, layer in gpt.layers().items() if all_meta(layer)]
    return {
        "held": {name: tuple(p.shape) for name, p in logical_parameters(stage).items()},
        "counted": sum(1 for _ in stage.parameters()),
        "on_meta": on_meta,
        "logits": None if world.rank == 0 else stage(between).detach(),
        "replicated": [
            name for name, p in logical_parameters(stage).items() if p.ds_pipe_replicated
        ],
        "tied_with": {key: comm["ranks"] for key, comm in stage.tied_comms.items()},
        "timeout_s": stage._grid.pp_proc_group._get_backend(
            torch.device("cpu")
        ).options._timeout.total_seconds(),
    }


def all_meta(layer):
    return all(p.is_meta for p in layer.parameters())


@pytest.mark.dist
@pytest.mark.timeout(90)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_two_stages_are_the_model(tied):
    config = replace(CONFIG, tied_head=tied)
    whole = GPT(config)
    initialize(whole, config, seed=1)
    first, last = run_ranks(describe, 2, config)
    assert torch.equal(last["logits"], whole.eval()(IDS))
    shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    assert {**first["held"], **last["held"]} == shapes
    shared = {"embedding.token.weight"} if tied else set()
    assert set(first["held"]) & set(last["held"]) == shared
    for stage in (first, last):
        assert stage["counted"] == len(stage["held"])  # and nothing without a name
        assert stage["tied_with"] == ({"embedding": [0, 1]} if tied else {})
        assert stage["timeout_s"] == 9
    assert first["on_meta"] == ["blocks.2", "final_norm", "head"]
    assert last["on_meta"] == ["embedding", "blocks.0", "blocks.1"]
    assert first["replicated"] == [] and set(last["replicated"]) == shared


def pipeline_norm(world, spoil):
    """global_grad_norm of two tensors per stage: one tied, one not."""
    groups = make_process_groups(Grid(pp=2), world.rank, timedelta(seconds=30))
    shared, own = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    shared.grad, own.grad = torch.full((3,), 2.0), torch.full((2,), 1.0 + world.rank)
    shared.ds_pipe_replicated = world.rank == 1
    if spoil and world.rank == 1:
        own.grad[0] = torch.nan
    return float(global_grad_norm([shared, own, nn.Parameter(torch.zeros(9))], groups))


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_norm_counts_each_parameter_once():
    # 3 x 4 once, 2 x 1 of stage 0, 2 x 4 of stage 1
    assert run_ranks(pipeline_norm, 2, False) == [pytest.approx(22**0.5)] * 2
    assert all(norm != norm for norm in run_ranks(pipeline_norm, 2, True))


def tensor_norm(world):
    """global_grad_norm of a sharded and a replicated tensor on two tensor ranks."""
    groups = make_process_groups(Grid(tp=2), world.rank, timedelta(seconds=30))
    whole, sharded = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    whole.grad, sharded.grad = torch.full((3,), 2.0), torch.full((2,), 1.0 + world.rank)
    sharded.model_parallel = True
    return float(global_grad_norm([whole, sharded], groups))


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_norm_over_tensor_ranks():
    assert run_ranks(tensor_norm, 2) == [pytest.approx(22**0.5)] * 2
