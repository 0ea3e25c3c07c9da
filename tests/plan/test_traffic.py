"""Counted bytes against the formulas, rank by rank; and the formulas against Megatron's by hand."""

from __future__ import annotations

import pytest
import torch

from fgpt.engine.build import build_engine
from fgpt.parallel.topology import Grid, count_traffic
from fgpt.plan.traffic import sent_bytes
from tests.engine.runs import SMALL, micro_batches, resolved_run, variant
from tests.ranks import run_ranks


def counted_and_predicted(world, folder, cases):
    """(sent, predicted) bytes of this rank's second step, for each case."""
    found = {}
    for name, (config, settings) in cases.items():
        resolved = resolved_run(folder / str(world.rank), config, world.size, **settings)
        engine = build_engine(resolved, world, torch.device("cpu"))
        engine.train_batch(micro_batches(resolved, world, 0))
        with count_traffic(engine.groups) as traffic:
            engine.train_batch(micro_batches(resolved, world, 1))
        engine.close()
        place = Grid.of(resolved.batch).coordinates(world.rank)
        counted = {kind: n for kind, n in traffic.bytes.items() if kind != "other" and n}
        found[name] = (counted, sent_bytes(resolved, place), traffic.bytes["other"])
    return found


def case(stage, changes=None, **parallel):
    changes = {"zero_optimization": {"stage": stage}, **(changes or {})}
    axes = {f"parallel__{axis}": size for axis, size in parallel.items()}
    return variant(**changes), axes


RECOMPUTE = {"activation_checkpointing": {}}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
LLAMA = {
    "model__qk_norm": True,
    "model__norm": "rmsnorm",
    "model__activation": "swiglu",
    "model__tied_head": False,
    "model__position": "rotary",
}


def llama(stage, **parallel):
    config, axes = case(stage, **parallel)
    return config, {**axes, **LLAMA}


MUON = {"optimizer": {"type": "Muon", "params": {"lr": 1e-3}}}
MUON_GRAM = {"optimizer": {"type": "Muon", "params": {"lr": 1e-3, "ns_method": "gram"}}}
ROUND_ROBIN = {"zero_optimization": {"stage": 1, "round_robin_gradients": True}}
TWO = {
    "tp": case(0, tp=2),
    "sp": case(1, tp=2, sequence=True),
    "sp recomputed": case(1, RECOMPUTE, tp=2, sequence=True),
    "cp": case(1, cp=2),
    "cp recomputed": case(0, RECOMPUTE, cp=2),
    "pp": case(1, pp=2),
    "dp": case(0),
    "zero1": case(1),
    "zero2": case(2),
    "llama tp": llama(1, tp=2),
    "llama sp": llama(1, tp=2, sequence=True),
    "llama pp": llama(1, pp=2),
    "muon tp": case(0, MUON, tp=2),
    "muon zero1": case(1, MUON),
    "muon gram bf16": case(0, {**MUON_GRAM, "bf16": {"enabled": True}}, tp=2),
    "muon round robin": case(1, {**MUON, **ROUND_ROBIN}),
    "muon zero2": case(2, MUON),
    "muon pp": case(1, MUON, pp=2),
}
FOUR = {
    "tp4": case(1, tp=4),
    "tp pp": case(1, tp=2, pp=2),
    "sp pp": case(1, tp=2, pp=2, sequence=True),
    "pp4": case(1, pp=4),
    "pp dp": case(1, pp=2),
    "cp tp": case(1, cp=2, tp=2),
    "cp pp": case(0, cp=2, pp=2),
    "muon tp": case(1, MUON, tp=2),
    "muon cp tp": case(1, MUON, tp=2, cp=2),
    "muon tp pp": case(1, MUON, tp=2, pp=2),
    "muon zero1": case(1, MUON),
}


def check(n, cases, folder):
    for rank, found in enumerate(run_ranks(counted_and_predicted, n, folder, cases, timeout_s=170)):
        for name, (counted, predicted, other) in found.items():
            kinds = predicted.keys() | (counted.keys() - {"data"})
            assert {k: counted.get(k, 0) for k in kinds} == {
                k: predicted.get(k, 0) for k in kinds
            }, (name, rank)
            assert other < 4096


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_two_ranks(tmp_path):
    check(2, TWO, tmp_path)


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_four_ranks(tmp_path):
    check(4, FOUR, tmp_path)


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_bf16_sends_half(tmp_path):
    cases = {"bf16": case(1, BF16, tp=2), "pp": case(1, BF16, pp=2)}
    check(2, cases, tmp_path)


def resolved(tmp_path, world, config, axes):
    return resolved_run(tmp_path, config, world, **axes)


def test_four_sums_a_layer_for_tensor_parallel_and_the_same_for_sequence(tmp_path):
    """Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2."""
    run = resolved(tmp_path, 4, *case(1, tp=4))
    micro, tokens, width = 2, 64, SMALL["model__d_model"]
    stream = micro * tokens * width * 4
    per_micro_batch = 4 * 4 * stream + 2 * stream + 3 * 4 * micro * tokens  # 4 layers, ends, loss
    place = Grid.of(run.batch).coordinates(0)
    sent = sent_bytes(run, place)["tensor"]
    assert sent == run.batch.accumulation * per_micro_batch * 2 * 3 // 4
    shared = resolved(tmp_path, 4, *case(1, tp=4, sequence=True))
    norms = 9 * 2 * width + 4 * 2 * width  # norms, biases after sums
    positions = 256 * width
    more = run.batch.accumulation * (norms + positions) * 4 * 2 * 3 // 4
    assert sent_bytes(shared, place)["tensor"] == sent + more
