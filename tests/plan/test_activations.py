"""Predicted activations against what autograd keeps on one and on several ranks, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fgpt.config.speed import fuses_loss
from fgpt.distributed.launch import World
from fgpt.engine.activation_checkpointing import EXPENSIVE
from fgpt.model.gpt import GPT
from fgpt.plan.memory import Activations, stage_table
from tests.plan.conftest import BF16, FP32_SUMS, Plan, planned
from tests.ranks import run_ranks


def kept_by(run: Callable[[], Tensor], own: nn.Module) -> int:
    """Bytes of the distinct storages that autograd saves, without the module's parameters."""
    ours = {p.untyped_storage().data_ptr() for p in own.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = run()  # as long as it lives no storage is used twice
    assert keep.requires_grad
    return sum(storages.values())


# large enough that rotary tables and the like are two per cent at most
WIDE = {"d_model": 64, "vocab_size": 512, "max_seq_len": 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "model",
    [{}, {"tied_head": False, "activation": "relu2", "logit_softcap": 30.0}, {"dropout": 0.1}],
)
def test_a_stage_keeps_what_autograd_keeps(
    model: dict[str, Any], dtype: torch.dtype, plan: Plan
) -> None:
    precision = BF16 | FP32_SUMS if dtype == torch.bfloat16 else {}
    resolved = plan("--pp", "2", world=2, ds=precision, **WIDE, **model)
    gpt = filled(GPT(resolved.run.model).to(dtype))
    names, layers = list(gpt.layers()), gpt.layers()
    ids = torch.randint(0, 512, (8, 64))
    for row in stage_table(resolved):
        own = names[names.index(row.first) : names.index(row.last) + 1]
        x = ids if row.stage == 0 else torch.randn(8, 64, 64, dtype=dtype, requires_grad=True)

        def run(x: Tensor = x, own: list[str] = own) -> Tensor:
            for name in own:
                x = layers[name](x)
            return gpt.loss(x, ids) if own[-1] == "head" else x

        expected = Activations(resolved).kept(own)
        assert kept_by(run, gpt) == pytest.approx(expected, rel=0.02)


def filled(gpt: GPT) -> GPT:
    """Fill the parameters with some values."""
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.02)
    return gpt


def kept_on_rank(world: World, folder: Path, cases: list[list[str]]) -> list[tuple[int, int]]:
    """(measured, predicted) bytes of one micro-batch on this rank, for each case's flags."""
    from datetime import timedelta

    from fgpt.parallel.tensor.local import local_config
    from fgpt.parallel.tensor.parallelize import parallelize
    from fgpt.parallel.topology import Grid, make_process_groups

    found = []
    here = folder / str(world.rank)
    here.mkdir()
    for flags in cases:
        resolved = planned(here, *flags, world=world.size, **WIDE)
        batch, config = resolved.batch, resolved.run.model
        groups = make_process_groups(Grid.of(batch), world.rank, timedelta(seconds=60))
        gpt = filled(GPT(local_config(config, batch.tp)))
        gpt.head.fused = fuses_loss(resolved.run, resolved.precision)
        parallelize(gpt, config, groups, sequence=resolved.run.parallel.sequence)
        ids = torch.randint(0, 512, (8, 64 // batch.cp), generator=torch.Generator().manual_seed(0))
        run = lambda gpt=gpt, ids=ids: gpt(ids, ids)  # noqa: E731
        found.append((kept_by(run, gpt), Activations(resolved).kept(list(gpt.layers()))))
    return found


DROPOUT = ["--set", "model.dropout=0.1"]
GRIDS = {
    2: [
        ["--tp", "2"],
        ["--tp", "2", "--sequence"],
        ["--tp", "2", "--sequence", *DROPOUT],
        ["--cp", "2"],
        ["--cp", "2", *DROPOUT],
    ],
    4: [["--tp", "2", "--cp", "2", "--sequence"], ["--tp", "4"], ["--cp", "4"]],
}


@pytest.mark.dist
@pytest.mark.timeout(120)
@pytest.mark.parametrize("n", GRIDS)
def test_a_rank_keeps_what_autograd_keeps(n: int, tmp_path: Path) -> None:
    for of_rank in run_ranks(kept_on_rank, n, tmp_path, GRIDS[n]):
        for flags, (measured, predicted) in zip(GRIDS[n], of_rank, strict=True):
            assert measured == pytest.approx(predicted, rel=0.02), flags


def test_recomputation_keeps_the_inputs_of_runs(plan: Plan) -> None:
    """4 blocks in 2 segments; stages of 1 and 3 blocks, whose last segment has one block."""
    flags = ["--pp", "2", "--set", "parallel.partition=1,3"]
    section = {"activation_checkpointing": {"number_checkpoints": 2}}
    every = Activations(plan(*flags, world=2))
    some = Activations(plan(*flags, world=2, ds=section))
    stream = 8 * 32 * 16 * 4  # micro batch, tokens, d_model, fp32
    block = every.kept(["blocks.0"])
    assert some.kept(["blocks.0"]) == stream
    assert some.recomputed(["blocks.0"]) == block
    three = ["blocks.1", "blocks.2", "blocks.3"]
    assert (some.kept(three), some.recomputed(three)) == (2 * stream, 2 * block)
    assert every.recomputed(three) == 0
    ends = ["embedding", "final_norm", "head"]
    assert some.kept(ends) == every.kept(ends)


def test_checkpoints_in_parts_and_on_the_host(plan: Plan) -> None:
    whole = plan("--tp", "2", world=2, ds={"activation_checkpointing": {}})
    parts = {"activation_checkpointing": {"partition_activations": True}}
    host = {"activation_checkpointing": {"cpu_checkpointing": True}}
    stream = Activations(whole).segment_input
    assert stream == 8 * 32 * 16 * 4
    assert Activations(plan("--tp", "2", world=2, ds=parts)).segment_input == stream / 2
    assert Activations(plan(world=2, ds=host)).segment_input == 0
    sequence = plan("--tp", "2", "--sequence", world=2, ds={"activation_checkpointing": {}})
    assert Activations(sequence).segment_input == stream / 2


def test_a_pipeline_holds_buffers(plan: Plan) -> None:
    """3 stages, 8 micro batches: 3, 2 and 1 in flight."""
    ds = {"gradient_accumulation_steps": 8}
    rows = stage_table(resolved := plan("--pp", "3", world=3, ds=ds))
    activations, stream = Activations(resolved), 8 * 32 * 16 * 4
    layers = [
        ["embedding", "blocks.0"],
        ["blocks.1", "blocks.2"],
        ["blocks.3", "final_norm", "head"],
    ]
    assert [row.first for row in rows] == [names[0] for names in layers]
    logits = 8 * 32 * 101 * 4
    buffers = [(3 + 1) * stream, (2 + 1) * stream + (2 + 1) * stream, (1 + 1) * stream + 2 * logits]
    for row, names, held in zip(rows, layers, buffers, strict=True):
        assert row.activations == row.in_flight * activations.kept(names) + held


def test_tensor_ranks_send_a_part_each(plan: Plan) -> None:
    stream = 8 * 32 * 16 * 4
    blocks = Activations(plan("--tp", "2", "--pp", "2", world=4))
    first = blocks.stage(0, ["blocks.0"], 1) - blocks.kept(["blocks.0"])
    assert first == 2 * stream / 2
    sequence = Activations(plan("--tp", "2", "--pp", "2", "--sequence", world=4))
    assert sequence.stage(0, ["blocks.0"], 1) - sequence.kept(["blocks.0"]) == first
    assert sequence.stage(0, ["blocks.0"], 1) < blocks.stage(0, ["blocks.0"], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", [{}, {"activation": "swiglu", "n_kv_head": 2, "norm": "rmsnorm"}])
def test_cheap_recomputation_keeps_products_and_attention(
    model: dict[str, Any], dtype: torch.dtype, plan: Plan
) -> None:
    """The outputs of these operators in a forward pass; the block's input is counted separately."""
    precision = BF16 if dtype == torch.bfloat16 else {}
    section = {"activation_checkpointing": {}}
    flags = ["--set", "speed.recompute=cheap"]
    resolved = plan(*flags, ds=precision | section, **WIDE, **model)
    gpt = filled(GPT(resolved.run.model).to(dtype))
    activations = Activations(resolved)
    x = torch.randn(8, 64, 64, dtype=dtype)
    with Outputs() as given:
        gpt.blocks[0](x)
    assert given.bytes == activations.kept(["blocks.0"]) - activations.segment_input
    rest = activations.recomputed(["blocks.0"]) + given.bytes
    assert rest == Activations(plan(ds=precision, **WIDE, **model)).kept(["blocks.0"])


class Outputs(TorchDispatchMode):
    """Counts the output bytes of `EXPENSIVE` operators."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in EXPENSIVE:
            tensors = output if isinstance(output, tuple) else (output,)
            self.bytes += sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        return output
