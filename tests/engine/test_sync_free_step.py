"""The sync-free ZeRO step: the same norms, losses and skipped steps as DeepSpeed's."""

from __future__ import annotations

import math
import traceback
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fgpt.distributed.launch import World
from tests.engine.runs import several_runs, variant
from tests.engine.test_equality import BF16, FP32_GRADIENTS, assert_same, oracle
from tests.ranks import run_ranks


@pytest.mark.dist
@pytest.mark.timeout(120)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_trains_as_the_plain_engine(tmp_path, precision):
    """Gradients bypass DeepSpeed's buckets: with one micro-batch per step and with four."""
    common = BF16 if precision == "bf16" else {}
    wanted = oracle(**common)
    stage = {"zero_optimization": {"stage": 1}, **common}
    whole = {"train_micro_batch_size_per_gpu": 8}
    configs = {"whole": {**stage, **whole}, "two": {"zero_optimization": {"stage": 2}, **common}}
    if precision == "fp32":
        configs["four"] = stage
    else:  # accumulation in bf16 differs from the oracle
        configs["four"] = {**stage, **FP32_GRADIENTS}
    both = {name: (variant(**changes), {}) for name, changes in configs.items()}
    (found,) = run_ranks(several_runs, 1, tmp_path / "rank", both)
    for run in found.values():
        assert_same(run, wanted, precision)


class Waits(TorchDispatchMode):
    """Records operations that synchronize with a GPU."""

    WAITING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.WAITING:
            self.found += traceback.format_stack(limit=6)
        return func(*args, **(kwargs or {}))


def waits_of_a_step(world: World, folder, config, lean):
    """Return the synchronizations of the third step, and the number of AsyncScalars it read."""
    from deepspeed.accelerator import get_accelerator

    from fgpt.engine.base import AsyncScalars
    from fgpt.engine.build import build_engine
    from tests.engine.runs import micro_batches, resolved_run

    resolved = resolved_run(folder / str(world.rank), config, world.size)
    engine = build_engine(resolved, world, torch.device("cpu"))
    assert (engine.optimizer_step.sync_free is not None) == lean
    for step in range(2):
        engine.train_batch(micro_batches(resolved, world, step))
    batches, late, read = micro_batches(resolved, world, 2), [], AsyncScalars.read

    def outside(numbers):
        late.append(numbers)
        with _disable_current_modes():
            return read(numbers)

    synchronized = []
    with Waits() as waits, mock.patch.object(AsyncScalars, "read", outside):
        with mock.patch.object(type(get_accelerator()), "synchronize", synchronized.append):
            engine.train_batch(batches)
    engine.close()
    return waits.found, len(late), len(synchronized)


@pytest.mark.dist
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_waits_for_nothing_but_the_one_before_it(tmp_path, ranks):
    stage = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 4 // ranks}
    config = variant(**stage, **BF16)
    config["optimizer"]["params"]["fused"] = True
    for found, read, synchronized in run_ranks(waits_of_a_step, ranks, tmp_path, config, True):
        assert found == [] and (read, synchronized) == (1, 0)
    config["optimizer"]["params"]["fused"] = False  # DeepSpeed's own step reads its norm
    for found, read, _ in run_ranks(waits_of_a_step, ranks, tmp_path, config, False):
        assert found and read == 0


def skipping(world: World, folder, config, fused):
    """Return rates and skips of eight steps; the first and two later ones are skipped."""
    from fgpt.engine.build import build_engine
    from tests.engine.runs import micro_batches, resolved_run

    config["optimizer"]["params"]["fused"] = fused
    resolved = resolved_run(folder / str(fused), config, world.size)
    engine = build_engine(resolved, world, torch.device("cpu"))
    assert (engine.optimizer_step.sync_free is not None) == fused
    head = engine.model.embedding.token.weight
    seen = []
    for step in range(8):
        hook = head.register_hook(lambda grad: grad * math.nan) if step in (0, 3, 4) else None
        result = engine.train_batch(micro_batches(resolved, world, step)).result()
        seen.append((result.learning_rate, result.skipped))
        if hook is not None:
            hook.remove()
    seen.append((engine.skipped_steps, engine.deepspeed.lr_scheduler.last_batch_iteration))
    engine.close()
    return seen


def both_ways(world: World, folder, config):
    """With the sync-free step and without it."""
    return [skipping(world, folder, config, fused) for fused in (True, False)]


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_a_skipped_step_leaves_the_schedule_where_it_is(tmp_path):
    config = variant(zero_optimization={"stage": 1}, train_micro_batch_size_per_gpu=8)
    ((late, at_once),) = run_ranks(both_ways, 1, tmp_path, config)
    assert late == at_once and late[-1][0] == 3
    assert [skipped for _, skipped in late[:-1]] == [step in (0, 3, 4) for step in range(8)]


def after_a_skip(world: World, folder, config):
    """Save after DeepSpeed's step has skipped, and continue with the sync-free step."""
    from fgpt.engine.build import build_engine
    from tests.checkpoint.saved import load_engine, save_engine
    from tests.engine.runs import micro_batches, resolved_run

    seen = []
    for fused in (False, True):
        config["optimizer"]["params"]["fused"] = fused
        resolved = resolved_run(folder / str(fused), config, world.size)
        engine = build_engine(resolved, world, torch.device("cpu"))
        if fused:
            load_engine(engine, world, folder / "step_00000003")
        for step in range(3):
            bad = not fused and step == 2
            head = engine.model.embedding.token.weight
            hook = head.register_hook(lambda grad: grad * math.nan) if bad else None
            result = engine.train_batch(micro_batches(resolved, world, engine.step)).result()
            seen.append(result.learning_rate)
            if hook is not None:
                hook.remove()
        counter = engine.deepspeed.lr_scheduler.last_batch_iteration
        seen.append((engine.step, engine.skipped_steps, counter))
        if not fused:
            save_engine(engine, world, folder)
        engine.close()
    return seen


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_a_checkpoint_of_a_skipped_step_goes_on(tmp_path):
    config = variant(zero_optimization={"stage": 1}, train_micro_batch_size_per_gpu=8)
    (seen,) = run_ranks(after_a_skip, 1, tmp_path, config)
    first, second, skipped, counts, again, *rest, in_the_end = seen
    assert (counts, in_the_end) == ((3, 1, 1), (6, 1, 4))
    assert again == skipped and len({skipped, *rest}) == 3


def kinds(world: World, folder, configs):
    """Return each engine's ZeRO stage, whether it is sync-free, and its first norm."""
    from fgpt.engine.build import build_engine
    from tests.engine.runs import micro_batches, resolved_run

    found = []
    for i, config in enumerate(configs):
        resolved = resolved_run(folder / str(i), config, world.size)
        engine = build_engine(resolved, world, torch.device("cpu"))
        optimizer = engine.deepspeed.optimizer
        norm = engine.train_batch(micro_batches(resolved, world, 0)).result().grad_norm
        stage = 2 if getattr(optimizer, "partition_gradients", False) else 1
        found.append((stage, engine.optimizer_step.sync_free is not None, norm))
        engine.close()
    return found


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_what_one_rank_needs_of_zero_2(tmp_path):
    """Buckets only where micro-batches accumulate in float32; not sync-free when timed."""
    whole = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}
    parts = {**whole, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    configs = [
        variant(**BF16, **whole, **FP32_GRADIENTS),
        variant(**BF16, **parts),
        variant(**BF16, **parts, **FP32_GRADIENTS),
        variant(**BF16, **whole, memory_breakdown=True),
    ]
    for config in configs:
        config["optimizer"]["params"]["fused"] = True
    (found,) = run_ranks(kinds, 1, tmp_path, configs)
    assert [kind[:2] for kind in found] == [(1, True), (1, True), (2, True), (1, False)]
    for _, _, norm in found:
        assert norm == pytest.approx(found[0][2], rel=1e-2) and norm > 0.1


def poisoned(world: World, folder, config):
    """In step 1 of three, the last rank's gradients are not finite."""
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
        results.append(engine.train_batch(micro_batches(resolved, world, step)).result())
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
