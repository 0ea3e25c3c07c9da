"""Every change that a resume allows, on every engine; every other one is refused with both values.

The changes are made together, in two sets: one that computes the same, whose losses must be those
of the uninterrupted run, and one that does not, whose losses must be those of the plain engine.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tiny import ADAM, Outcome, Tiny, train_all

pytestmark = pytest.mark.dist

AT, LAST = 2, 4
"""The step of the checkpoint; the last step."""
BASE = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
BF16 = {"bf16": {"enabled": True}}
# name -> (DeepSpeed JSON, flags)
ENGINES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ("--set=train.engine=plain",)),
    **{f"zero{n}": ({"zero_optimization": {"stage": n}}, ()) for n in range(4)},
    "pp": ({"zero_optimization": {"stage": 1}}, ("--pp=2",)),
    **{f"bf16 zero{n}": ({"zero_optimization": {"stage": n}, **BF16}, ()) for n in (1, 3)},
}
SAME_ZERO = {
    "reduce_bucket_size": 500,
    "allgather_bucket_size": 400,
    "parameter_alignment": True,
    "offload_optimizer": {"device": "cpu"},
    "stage3_param_persistence_threshold": 0,
    "sub_group_size": 10**8,
}
SAME: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "activation_checkpointing": {},
    "optimizer": {"type": "AdamW", "params": {**ADAM, "fused": False}},
    "csv_monitor": {"enabled": True},
    "wall_clock_breakdown": True,
    "comms_logger": {"enabled": True, "verbose": True},
    "flops_profiler": {"enabled": True, "profile_step": 3},
    "steps_per_print": 1,
}
SAME_FLAGS = ("train.log_every=1", "eval.every=1", "checkpoint.every=1", "checkpoint.keep=3")
SAME_FLAGS += ("speed.loss=plain", "speed.matmul=torch", "data.prefetch=0", "sample.top_k=3")
OTHER = {
    "gradient_clipping": 0.3,
    "optimizer": {
        "type": "AdamW",
        "params": {**ADAM, "lr": 0.02, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.3},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 10, "warmup_type": "linear"},
    },
}


def runs_of(tiny: Tiny, name: str) -> list[list[str]]:
    """The uninterrupted run of an engine, and its checkpoint continued with each set of changes."""
    ds, flags = ENGINES[name]

    def flags_of(kind: str, changes: dict[str, Any], *more: object) -> list[str]:
        file = tiny.ds(f"{name} {kind}", **{**BASE, **ds, **changes})
        return tiny.flags(f"{name} {kind}", *flags, "--steps", LAST, *more, ds=file)

    resume = ("--resume", tiny.checkpoint(f"{name} whole", AT))
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    zero = {"zero_optimization": {"stage": stage, **SAME_ZERO}} if stage else {}
    same = [f"--set={change}" for change in SAME_FLAGS]
    return [
        flags_of("whole", {}, "--set=checkpoint.keep=9"),
        flags_of("same", {**SAME, **zero}, *same, *resume),
        flags_of("other", OTHER, *resume),
    ]


@pytest.mark.timeout(240)
def test_what_a_resume_may_change(tiny: Tiny) -> None:
    plain = run_ranks(train_all, 1, runs_of(tiny, "plain"))[0]
    names = [name for name in ENGINES if name != "plain"]
    runs = [flags for name in names for flags in runs_of(tiny, name)]
    outcomes = plain + run_ranks(train_all, 2, runs, timeout_s=200)[0]
    by_engine = dict(zip(ENGINES, zip(*[iter(outcomes)] * 3, strict=True), strict=True))
    for name, (whole, same, other) in by_engine.items():
        assert [whole.code, same.code, other.code] == [0, 0, 0], (name, same, other)
        close = 1e-5 if name in ("plain", "pp") or name.startswith("zero") else 1e-3
        expected = pytest.approx([loss for _, loss in tiny.losses(f"{name} whole")], rel=close)
        part = tiny.losses(f"{name} whole")[:AT] + tiny.losses(f"{name} same")
        assert [loss for _, loss in part] == expected, name
        for change in ("train.log_every: 10 -> 1", "csv_monitor", "train_micro_batch_size_per_gpu"):
            assert change in same.output, (name, same.output)
        records, oracle = tiny.records(f"{name} other"), tiny.records("plain other")
        for mine, true in zip(records, oracle, strict=True):
            assert mine["step"] == true["step"] > AT
            assert mine["loss"] == pytest.approx(true["loss"], rel=close), name
            # linear warm-up in ten steps: DeepSpeed's first two steps have rate 0
            rate = 0.02 * (mine["step"] - 2) / 10
            assert mine["learning_rate"] == true["learning_rate"] == pytest.approx(rate), name
        assert "lr: 0.01 -> 0.02" in other.output and "scheduler" in other.output


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


# engine, changes of the JSON, flags -> what the refusal says
REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...], str]] = [
    ("zero1", zero(2), (), "ZeRO stage: checkpoint 1, this run 2"),
    ("zero1", BF16, (), "precision: checkpoint 'fp32', this run 'bf16'"),
    ("zero1", {"train_batch_size": 4}, (), "global batch (samples): checkpoint 8, this run 4"),
    ("zero1", {}, ("--tp=2",), "tensor-parallel ranks (tp): checkpoint 1, this run 2"),
    ("zero1", {}, ("--seed=5",), "train.seed: checkpoint 1234, this run 5"),
    ("zero1", {}, ("--set=model.n_layer=4",), "model.n_layer: checkpoint 2, this run 4"),
    ("zero1", {}, ("--set=data.packing=best_fit",), "data.packing: checkpoint 'stream', this run"),
    (
        "zero1",
        zero(1, round_robin_gradients=True),
        (),
        "zero_optimization.round_robin_gradients: checkpoint False, this run True",
    ),
    (
        "zero3",
        zero(3, sub_group_size=1000),
        (),
        "zero_optimization.sub_group_size: checkpoint 39296, this run 1000",
    ),
    (
        "zero1",
        {"optimizer": {"type": "Adam", "params": ADAM}},
        (),
        "optimizer: checkpoint 'AdamW', this run 'Adam'",
    ),
    (
        "zero1",
        {"optimizer": {"type": "AdamW", "params": {**ADAM, "amsgrad": True}}},
        (),
        "optimizer states (amsgrad and momentum add one): checkpoint [",
    ),
]


def test_what_a_resume_may_not_change(tiny: Tiny) -> None:
    (tiny.folder / "file").touch()
    (tiny.folder / "empty").mkdir()
    whole = {name: runs_of(tiny, name)[0] for name in ("zero1", "zero3")}
    folder = tiny.path("zero1 whole") / "checkpoints"
    places = {
        folder / "step_00000003": f"does not exist; {folder} has step_00000002, step_00000004",
        folder.parent / "step_2": f"does not exist; {folder} has step_00000002, step_00000004",
        tiny.folder / "nowhere": "does not exist; name a run directory",
        tiny.folder / "file": "is a file; name a run directory",
        tiny.folder / "empty": "has no checkpoint; name a run directory",
    }
    resumed = [
        (changes, (*flags, "--resume", tiny.path(f"{name} whole")), name)
        for name, changes, flags, _ in REFUSED
    ]
    resumed += [({}, ("--resume", place), "zero1") for place in (*places, folder)]
    runs = [  # a refused run of this process still holds the lock of its directory
        tiny.flags(f"run {i}", *flags, ds=tiny.ds(f"ds {i}", **BASE | ENGINES[name][0] | changes))
        for i, (changes, flags, name) in enumerate(resumed)
    ]
    outcomes = run_ranks(train_all, 2, [*whole.values(), *runs], timeout_s=80)[0]
    assert all(outcome.code == 0 for outcome in (*outcomes[:2], outcomes[-1])), outcomes
    refused: list[Outcome] = outcomes[2:-1]
    texts = [text for *_, text in REFUSED] + list(places.values())
    for outcome, text in zip(refused, texts, strict=True):
        assert outcome.code == 2 and text in outcome.error, (text, outcome.error)
        assert "\n" not in outcome.error
