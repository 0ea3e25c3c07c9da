"""Every change that a resume allows, on every engine; every other one is refused with both values.

The changes are made together, in two sets: one that computes the same, whose losses must be those
of the uninterrupted run, and one that does not, whose losses must be those of the plain engine.
"""

from __future__ import annotations

from typing import Any

import pytest

from fgpt.checkpoint.manifest import read_manifest
from fgpt.cli.train import parser
from tests.ranks import run_ranks
from tests.tiny import ADAM, Outcome, Tiny, train_all, zero

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


REFUSED: list[tuple[dict[str, Any], tuple[str, ...], str, str]] = [
    # changes of the JSON, flags, what the refusal says, the --allow that it names
    ({"train_batch_size": 4}, (), "global batch (samples): checkpoint 8, this run 4", "batch"),
    ({}, ("--seed=5",), "train.seed: checkpoint 1234, this run 5", "seed"),
    ({}, ("--set=model.n_layer=4",), "model: model.n_layer: checkpoint 2, this run 4;", ""),
    ({}, ("--set=data.packing=best_fit",), "data.packing: checkpoint 'stream', this run", "data"),
    (
        {},
        ("--set=model.n_layer=4", "--allow=model"),
        "blocks.2.attention.out.bias: checkpoint none, this run [32]; choose that model, or",
        "",
    ),
]


def test_what_a_resume_may_not_change(tiny: Tiny) -> None:
    (tiny.folder / "file").touch()
    (tiny.folder / "empty").mkdir()
    whole = runs_of(tiny, "zero1")[0]
    folder = tiny.path("zero1 whole") / "checkpoints"
    places = {
        folder / "step_00000003": f"does not exist; {folder} has step_00000002, step_00000004",
        folder.parent / "step_2": f"does not exist; {folder} has step_00000002, step_00000004",
        tiny.folder / "nowhere": "does not exist; name a run directory",
        tiny.folder / "file": "is a file; name a run directory",
        tiny.folder / "empty": "has no checkpoint; name a run directory",
    }
    resumed = [
        (changes, (*flags, "--resume", tiny.path("zero1 whole"))) for changes, flags, *_ in REFUSED
    ]
    resumed += [({}, ("--resume", place)) for place in (*places, folder)]
    runs = [  # a refused run of this process still holds the lock of its directory
        tiny.flags(f"run {i}", *flags, ds=tiny.ds(f"ds {i}", **BASE | zero(1) | changes))
        for i, (changes, flags) in enumerate(resumed)
    ]
    outcomes = run_ranks(train_all, 2, [whole, *runs], timeout_s=80)[0]
    assert outcomes[0].code == outcomes[-1].code == 0, outcomes
    refused: list[Outcome] = outcomes[1:-1]
    texts = [text for *_, text, _ in REFUSED] + list(places.values())
    for outcome, text in zip(refused, texts, strict=True):
        assert outcome.code == 2 and text in outcome.error, (text, outcome.error)
        assert "\n" not in outcome.error
    for (*_, kind), outcome in zip(REFUSED, refused, strict=False):
        assert not kind or f"let it differ with --allow {kind}, or start afresh" in outcome.error


# name -> (changes of the JSON, flags, --allow, number of the first sample after the resume)
ALLOWED: dict[str, tuple[dict[str, Any], tuple[str, ...], str, int]] = {
    "batch": ({"train_batch_size": 4}, (), "batch", 8 * AT),
    "order": ({}, ("--set=data.seed=5",), "seed", 0),
    "dropout": ({}, ("--set=model.dropout=0.2", "--seed=9"), "seed, model", 8 * AT),
    "length": ({}, ("--set=data.seq_len=16", "--set=data.packing=best_fit"), "data,seq_len", 0),
}


def test_what_a_resume_may_change_if_it_is_allowed(tiny: Tiny) -> None:
    """A new phase: said, recorded, and resumed without a word about it."""
    runs = [runs_of(tiny, "zero1")[0]]
    for name, (changes, flags, allow, _) in ALLOWED.items():
        ds = tiny.ds(name, **BASE | zero(1) | changes)
        resume = ("--resume", tiny.checkpoint("zero1 whole", AT), "--allow", allow)
        runs.append(tiny.flags(name, *flags, *resume, "--steps", LAST, ds=ds))
        runs.append(tiny.flags(name, *flags, "--resume=auto", "--steps", LAST + 2, ds=ds))
    first, *rest = run_ranks(train_all, 2, runs, timeout_s=80)[0]
    assert first.code == 0
    whole = dict(tiny.losses("zero1 whole"))
    for i, (name, (changes, flags, _, sample)) in enumerate(ALLOWED.items()):
        resumed, again = rest[2 * i : 2 * i + 2]
        assert resumed.code == again.code == 0, (name, resumed, again)
        assert f"the data goes on at sample {sample}\n" in resumed.output, name
        assert "allowed to differ" not in again.output
        manifest = read_manifest(tiny.checkpoint(name, LAST + 2))
        assert [start.step for start in manifest.history] == [0, AT, LAST]
        assert len(manifest.history[1].changes) == len(changes) + len(flags), name
        assert manifest.history[2].changes == ()
        batch = 4 if name == "batch" else 8
        assert manifest.samples_seen == sample + batch * (LAST + 2 - AT)
        length = 16 if name == "length" else 32
        assert manifest.tokens_seen == 32 * 8 * AT + length * batch * (LAST + 2 - AT)
        assert dict(tiny.losses(name))[LAST] != whole[LAST], name


def test_what_allow_may_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["--ds_config", "a.json", "--allow", "data,vocab"])
    assert end.value.code == 2
    assert "'vocab' is none of data, batch, seq_len, seed, model" in capsys.readouterr().err
