"""Muon trains the same run on every engine, by the bounds of AdamW, with clipping active.

DeepSpeed's own Muon would not: with ZeRO and clipping it clips the orthogonalized update.
"""

from __future__ import annotations

import pytest
import torch

from fgpt.parallel import matrices
from fgpt.parallel.topology import Grid
from tests.engine.runs import several_runs, variant
from tests.engine.test_equality import BF16, BOUNDS, ZERO, assert_same, largest, oracle
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist

MUON = {
    "type": "Muon",
    "params": {"lr": 3e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"},
}
LLAMA = {"model__n_kv_head": 2, "model__bias": False, "model__activation": "swiglu"}


def compare(n, folder, cases, settings, precision, **common):
    """`cases`: name -> (DeepSpeed sections, run settings); `settings` and `common` of all."""
    wanted = oracle(settings, optimizer=MUON, **common)
    assert max(wanted["norm"]) > 1.0  # clipping is active
    assert wanted["loss"][-1] < wanted["loss"][0] - 0.7  # the loss falls
    both = {
        name: (variant(optimizer=MUON, **common, **sections), {**settings, **own})
        for name, (sections, own) in cases.items()
    }
    for name, run in run_ranks(several_runs, n, folder / "ranks", both, timeout_s=170)[0].items():
        assert largest(run["loss"], wanted["loss"]) < BOUNDS[precision][0], name
        if precision == "fp32":
            assert_same(run, wanted, precision)


def case(stage, **parallel):
    zero = {"zero_optimization": ZERO.get(stage, {"stage": 0})}
    return zero, {f"parallel__{axis}": size for axis, size in parallel.items()}


@pytest.mark.timeout(180)
def test_two_ranks(tmp_path):
    cases = {
        "zero1": case("zero1"),
        "zero3-offload": case("zero3-offload"),
        "tp2 sp": case("zero0", tp=2, sequence=True),
        "pp2": case("zero1", pp=2),
    }
    compare(2, tmp_path, cases, LLAMA, "fp32")


@pytest.mark.timeout(180)
def test_bf16(tmp_path):
    """Weights are not compared: small singular values of a momentum are rounding errors, which the
    orthogonalization makes as large as the others.
    """
    cases = {name: case(name) for name in ("zero1", "zero3")}
    compare(2, tmp_path, cases, {}, "bf16", **BF16)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_more(tmp_path):
    cases = {stage: case(stage) for stage in ("zero0", "zero2", "zero3", "zero2-offload")}
    cases |= {"cp2": case("zero2", cp=2), "tp2 zero3": case("zero3", tp=2)}
    compare(2, tmp_path, cases, {}, "fp32")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_four_ranks(tmp_path):
    cases = {
        "tp2 zero1": case("zero1", tp=2),
        "tp2 zero3": case("zero3", tp=2),
        "pp2 cp2": case("zero1", pp=2, cp=2),
        "pp4": case("zero1", pp=4),  # stages of blocks alone
        "tp2 pp2": case("zero1", tp=2, pp=2),
        "zero1": case("zero1"),
        "zero3-offload": case("zero3-offload"),
    }
    compare(4, tmp_path, cases, LLAMA, "fp32")


def exchanged(world, tp, round_elements, dtype=torch.float32):
    """The largest difference of an exchange from the whole matrices, with ranges of random sizes
    that leave some ranks without any.
    """
    from fgpt.optim.muon import MatrixUpdate, WholeMatrices
    from fgpt.parallel.tensor.sharding import shard_parameter

    matrices.ROUND_ELEMENTS = round_elements
    update = MatrixUpdate((2, 2), "match_rms_adamw", 5, "standard", dtype)
    shapes = {
        "blocks.0.attention.qkv.weight": torch.Size((16, 12)),
        "blocks.0.attention.out.weight": torch.Size((12, 8)),
        "blocks.1.mlp.up.weight": torch.Size((20, 12)),
        "blocks.1.mlp.down.weight": torch.Size((12, 20)),
    }
    torch.manual_seed(3)
    whole = {name: 1e-8 * torch.randn(shape) for name, shape in shapes.items()}
    place = Grid(tp=tp, dp=world.size // tp).coordinates(world.rank)
    # 1. this rank's ranges, one after another with gaps
    kept, offset = [], 0
    for n, (name, value) in enumerate(whole.items()):
        size = value.numel() // tp
        replicas = world.size // tp
        cuts = [0, *sorted((17 * n + 31 * r) % (size + 1) for r in range(replicas - 1)), size]
        begin, end = cuts[place.data], cuts[place.data + 1]
        if begin < end:
            kept.append(matrices.KeptRange(name, begin, end, offset))
        offset += end - begin + 3
    momenta = torch.full((offset,), torch.nan)
    for part in kept:
        flat = shard_parameter(part.name, whole[part.name], place.tensor, tp).reshape(-1)
        momenta[part.offset :][: part.end - part.begin] = flat[part.begin : part.end]
    # 2. the same for whole matrices
    names = list(whole)
    parameters = [torch.nn.Parameter(value) for value in whole.values()]
    wanted = [value.clone() for value in whole.values()]
    WholeMatrices(dict(zip(parameters, names, strict=True)), update)(parameters, wanted)
    # 3. compare what this rank keeps, and that nothing else was written
    parameter = torch.zeros(offset)
    shared = matrices.ShardedMatrices(
        [(parameter, kept)], shapes, tp, torch.distributed.group.WORLD, torch.device("cpu"), update
    )
    before = momenta.clone()
    shared([parameter], [momenta])
    largest_difference = 0.0
    for part in kept:
        full = wanted[names.index(part.name)]
        flat = shard_parameter(part.name, full, place.tensor, tp).reshape(-1)
        here = slice(part.offset, part.offset + part.end - part.begin)
        difference = (momenta[here] - flat[part.begin : part.end]).abs().max()
        largest_difference = max(largest_difference, float(difference))
        before[here] = momenta[here]
    assert torch.equal(before.isnan(), momenta.isnan())
    rounds = shared._planned((0,))
    owners = [[m.owner for _, m in matrices_] for matrices_ in rounds]
    assert sum(map(len, owners)) == len(shapes)
    if round_elements == 10:  # one matrix of each owner
        assert all(len(set(o)) == len(o) for o in owners)
    else:
        assert len(rounds) == 1
    return largest_difference


def everything_exchanged(world, tps):
    return [exchanged(world, tp, size) for tp in tps for size in (10, 2**24)]


@pytest.mark.parametrize(("n", "tps"), [(2, (1, 2)), (3, (1,))])
def test_exchange_of_any_ranges(n, tps):
    for found in run_ranks(everything_exchanged, n, tps):
        assert max(found) < 1e-5


def test_small_momenta_in_float16():
    """Momenta that float16 rounds to 0 are exchanged in float32."""
    for found in run_ranks(exchanged, 2, 1, 10, torch.float16):
        assert found < 2e-3
