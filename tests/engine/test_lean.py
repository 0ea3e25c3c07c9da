"""DeepSpeed's optimizer with fewer operations: the same norms, losses and skipped steps."""

from __future__ import annotations

import math

import pytest
import torch

from fgpt.engine.launch import World
from fgpt.engine.lean import square_sum
from tests.distributed import run_ranks
from tests.engine.runs import several_runs, variant
from tests.engine.test_equality import BF16, FP32_GRADIENTS, assert_same, oracle


@pytest.mark.dist
@pytest.mark.timeout(120)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_trains_as_the_plain_engine(tmp_path, precision):
    """Where gradients skip DeepSpeed's buckets: with one micro-batch a step and with four."""
    common = BF16 if precision == "bf16" else {}
    wanted = oracle(tmp_path / "plain", **common)
    stage = {"zero_optimization": {"stage": 1}, **common}
    whole = {"train_micro_batch_size_per_gpu": 8}
    configs = {"whole": {**stage, **whole}, "two": {"zero_optimization": {"stage": 2}, **common}}
    if precision == "fp32":
        configs["four"] = stage
    else:  # gradients that add up in bf16 are not the oracle's
        configs["four"] = {**stage, **FP32_GRADIENTS}
    both = {name: (variant(**changes), {}) for name, changes in configs.items()}
    (found,) = run_ranks(several_runs, 1, tmp_path / "rank", both)
    for run in found.values():
        assert_same(run, wanted, precision)


def test_squares_add_up_exactly_on_a_cpu():
    parts = [torch.full((1000, 1000), 0.1), torch.full((7,), -2.0)]
    exact = 1e6 * float(torch.tensor(0.1)) ** 2 + 28.0
    assert float(square_sum(parts, "cpu")) == pytest.approx(exact, rel=1e-7)
    assert float(square_sum([], "cpu")) == 0.0
    assert math.isnan(square_sum([torch.tensor([math.nan])], "cpu"))


def poisoned(world: World, folder, config):
    """Steps 0 and 2 are ordinary, in step 1 the last rank's gradients are not finite."""
    from fgpt.engine.build import build_engine
    from tests.engine.runs import micro_batches, resolved_run

    resolved = resolved_run(folder / str(world.rank), config, world.size)
    engine = build_engine(resolved, world, torch.device("cpu"))
    head = engine.model.embedding.token.weight
    results = []
    for step in range(3):
        hook = None
        if step == 1 and world.rank == world.size - 1:
            hook = head.register_hook(lambda grad: torch.full_like(grad, math.inf))
        before = engine.deepspeed.optimizer.single_partition_of_fp32_groups[0].clone()
        results.append(engine.train_batch(micro_batches(resolved, world, step)))
        after = engine.deepspeed.optimizer.single_partition_of_fp32_groups[0]
        results[-1] = (results[-1].skipped, torch.equal(before, after))
        if hook is not None:
            hook.remove()
    skipped = engine.skipped_steps
    engine.close()
    return results, skipped


@pytest.mark.dist
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_infinite_gradient_changes_nothing(tmp_path, ranks, precision):
    more = BF16 if precision == "bf16" else {}
    config = variant(zero_optimization={"stage": 1}, **more)
    config["train_micro_batch_size_per_gpu"] = 8 // ranks
    config["optimizer"]["params"]["lr"] = 1e-3
    del config["scheduler"]  # its first step has rate 0
    for results, skipped in run_ranks(poisoned, ranks, tmp_path, config):
        assert results == [(False, False), (True, True), (False, False)]
        assert skipped == 1
