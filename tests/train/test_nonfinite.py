"""NaN never reaches the weights of any rank, and a run that only skips steps ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.distributed.launch import World
from tests.checkpoint.saved import state_of
from tests.ranks import run_ranks
from tests.tiny import STEPS, Outcome, Tiny, train_all

pytestmark = pytest.mark.dist

BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
ENGINES: dict[str, dict[str, Any]] = {
    **{f"z{stage}-fp32": {"zero_optimization": {"stage": stage}} for stage in range(4)},
    "z2-bf16": BF16,
    "z2-bf16-fp32-sums": FP32_SUMS,
    "z2-accumulation": {"gradient_accumulation_steps": 2},
}
MAX_SKIPPED = 3


def poisoned(world: World, runs: list[list[str]], rank: int, steps: set[int]) -> list[Outcome]:
    """Train; the loss of `rank` is NaN in these steps, and so are its gradients."""
    from fgpt.engine.deepspeed.zero_engine import ZeroEngine

    train_batch = ZeroEngine.train_batch

    def poison(self: Any, batches: Any) -> Any:
        bad = world.rank == rank and self.step + 1 in steps
        handle = self.model.register_forward_hook(lambda m, i, out: out * float("nan"))
        if not bad:
            handle.remove()
        try:
            return train_batch(self, batches)
        finally:
            handle.remove()

    ZeroEngine.train_batch = poison  # type: ignore[method-assign]
    return train_all(world, runs)


def all_finite(checkpoint: Path) -> bool:
    """Assert finite weights and moments."""
    tensors = state_of(checkpoint).values()
    return len(tensors) > 4 and all(bool(torch.isfinite(t.float()).all()) for t in tensors)


@pytest.mark.parametrize("name", ENGINES)
def test_a_bad_step_is_skipped_on_all_ranks(tiny: Tiny, name: str) -> None:
    ds = tiny.ds(**ENGINES[name])
    flags = tiny.flags("run", "--set=train.log_every=1", ds=ds)
    (leader,), (other,) = run_ranks(poisoned, 2, [flags], 1, {3, 4})
    assert leader.code == other.code == 0, leader.error
    records = tiny.records("run")
    assert [r["skipped"] for r in records] == [False, False, True, True, False, False]
    assert all(r["loss"] > 0 for r in records if not r["skipped"])
    assert "skipped 2" in leader.output, leader.output
    assert json.loads((tiny.path("run") / "summary.json").read_text())["skipped_steps"] == 2
    assert all_finite(tiny.checkpoint("run", 4)) and all_finite(tiny.checkpoint("run", STEPS))


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        # each engine with the NaN on one of the ranks; on the other one in make test-all
        pytest.param(name, rank, marks=() if rank == i % 2 else pytest.mark.slow)
        for i, name in enumerate(ENGINES)
        for rank in range(2)
    ],
)
def test_a_run_that_only_skips_ends(tiny: Tiny, name: str, rank: int) -> None:
    ds = tiny.ds(**ENGINES[name])
    flags = tiny.flags("run", "--steps", 50, f"--set=train.max_skipped={MAX_SKIPPED}", ds=ds)
    results = run_ranks(poisoned, 2, [flags], rank, set(range(3, 50)))
    last = 2 + MAX_SKIPPED
    for (outcome,) in results:
        assert outcome.code == 1
        assert f"step {last}: {MAX_SKIPPED} steps in a row had non-finite" in outcome.error
    dump = json.loads((tiny.path("run") / f"nonfinite_step_{last:08d}.json").read_text())
    size = 2 * 2 * ENGINES[name].get("gradient_accumulation_steps", 1)
    ids = [i for micro in dump["samples"] for rank_ids in micro for i in rank_ids]
    assert dump["step"] == last and ids == list(range((last - 1) * size, last * size))
    assert tiny.losses("run")[-1][0] == last
    assert all_finite(tiny.checkpoint("run", 4))


GRIDS: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    # ranks, flags, changes of the JSON
    "pp2-z0-fp32": (2, ("--pp=2",), {"zero_optimization": {"stage": 0}}),
    "pp2-z1-bf16": (2, ("--pp=2",), {"zero_optimization": {"stage": 1}} | FP32_SUMS),
    "tp2-z0-fp32": (2, ("--tp=2",), {"zero_optimization": {"stage": 0}}),
    "tp2-z3-fp32": (2, ("--tp=2",), {"zero_optimization": {"stage": 3}}),
    "cp2-z1-fp32": (2, ("--cp=2",), {"zero_optimization": {"stage": 1}}),
    "tp2-pp2-z1-fp32": (4, ("--tp=2", "--pp=2"), {"zero_optimization": {"stage": 1}}),
}


def spoiled(world: World, flags: list[str], rank: int, first: int) -> Outcome:
    """Train; from step `first` on, the gradient of a block's bias has a NaN, on `rank` only."""
    from fgpt.engine.deepspeed.pipeline_engine import PipeEngine
    from fgpt.engine.deepspeed.zero_engine import ZeroEngine

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[3] = torch.nan
        return gradient

    def spoiling(train_batch: Any) -> Any:
        def run(self: Any, batches: Any) -> Any:
            if world.rank == rank and self.step + 1 == first:
                bias = next(p for n, p in self.parameters().items() if n.endswith("mlp.up.bias"))
                bias.register_hook(spoil)
            return train_batch(self, batches)

        return run

    for kind in (PipeEngine, ZeroEngine):
        kind.train_batch = spoiling(kind.train_batch)  # type: ignore[method-assign]
    return train_all(world, [flags])[0]


@pytest.mark.parametrize("name", GRIDS)
def test_one_rank_of_a_grid_makes_all_skip(tiny: Tiny, name: str) -> None:
    n, grid, changes = GRIDS[name]
    ds = tiny.ds(**changes, gradient_accumulation_steps=2)
    flags = tiny.flags("run", *grid, "--steps", 50, f"--set=train.max_skipped={MAX_SKIPPED}", ds=ds)
    last = 2 + MAX_SKIPPED
    for outcome in run_ranks(spoiled, n, flags, n - 1, 3):
        assert outcome.code == 1 and "\n" not in outcome.error
        assert f"step {last}: {MAX_SKIPPED} steps in a row had non-finite" in outcome.error
    dump = json.loads((tiny.path("run") / f"nonfinite_step_{last:08d}.json").read_text())
    ids = [i for micro in dump["samples"] for rank_ids in micro for i in rank_ids]
    assert dump["step"] == last and ids == list(range((last - 1) * 4, last * 4))
    assert [r["skipped"] for r in tiny.records("run")] == [False] * 2 + [True] * MAX_SKIPPED
    assert all_finite(tiny.checkpoint("run", 4))


def broken_weight(world: World, flags: list[str], rank: int, step: int) -> Outcome:
    """Train; after `step` one weight of `rank` is NaN."""
    from fgpt.engine.deepspeed.pipeline_engine import PipeEngine
    from fgpt.engine.deepspeed.zero_engine import ZeroEngine

    def breaking(train_batch: Any) -> Any:
        def run(self: Any, batches: Any) -> Any:
            result = train_batch(self, batches)
            if world.rank == rank and self.step == step:
                weight = next(self.model.parameters())
                getattr(weight, "ds_tensor", weight).data.view(-1)[0] = float("nan")
            return result

        return run

    for kind in (PipeEngine, ZeroEngine):
        kind.train_batch = breaking(kind.train_batch)  # type: ignore[method-assign]
    return train_all(world, [flags])[0]


@pytest.mark.parametrize(
    ("stage", "grid"),
    [*((stage, ()) for stage in (0, 2, 3)), (1, ("--pp=2",)), (2, ("--tp=2",))],
)
def test_non_finite_weights_are_never_saved(tiny: Tiny, stage: int, grid: tuple[str, ...]) -> None:
    ds = tiny.ds(zero_optimization={"stage": stage})
    flags = tiny.flags("run", *grid, "--steps", 4, ds=ds)
    for outcome in run_ranks(broken_weight, 2, flags, 1, 4):
        assert outcome.code == 1 and "weights are not finite" in outcome.error
    assert tiny.checkpoints("run") == ["latest", "step_00000002"]
    assert all_finite(tiny.checkpoint("run", 2))
