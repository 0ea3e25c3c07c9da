"""An interrupted and resumed run equals the uninterrupted run bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fgpt.checkpoint.manifest import read_manifest
from fgpt.distributed.launch import World
from fgpt.engine.deepspeed.ops import load_operator
from fgpt.prepare.pipeline import prepare
from fgpt.tokenizer.spec import TokenizerSpec
from tests.checkpoint.saved import assert_same_state
from tests.engine.test_own_json import nvme_offloads, skip_without_libaio
from tests.prepare.corpora import small_recipe, write_corpus
from tests.ranks import run_ranks
from tests.tiny import ADAM, STEPS, Outcome, Tiny, train_all, zero

pytestmark = pytest.mark.dist

AT = 4
"""The step that runs are resumed at; the one before the last checkpoint."""
BF16 = {"bf16": {"enabled": True}}
BF16_STATES = {
    "bf16": {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    }
}
FP32_SUMS = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
DROPOUT = ("--set=model.dropout=0.1",)
RECOMPUTE = {"activation_checkpointing": {"number_checkpoints": 2}}
WARMUP = {
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 6, "warmup_num_steps": 2}}
}
TWICE = {"gradient_accumulation_steps": 2}


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ADAM_8BIT = {"optimizer": {"type": "AdamW8bit", "params": {"lr": 1e-3, "min_8bit_size": 256}}}
MUON = {"optimizer": {"type": "Muon", "params": {"lr": 3e-3, "weight_decay": 0.1}}}
MATRIX: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **{f"z{stage}-fp32": (zero(stage), ()) for stage in range(4)},
    **{f"z{stage}-bf16": (zero(stage) | BF16, ()) for stage in (1, 2, 3)},
    **{f"z{stage}-bf16-states": (zero(stage) | BF16_STATES, ()) for stage in (2, 3)},
    "z1-autocast": (zero(1) | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, ()),
    "z2-bf16-fp32-sums": (zero(2) | FP32_SUMS, ()),
    "z2-offload": (zero(2, **OFFLOAD), ()),
    "z2-accumulation": (zero(2) | TWICE | WARMUP, ()),
    "z0-8bit": (zero(0) | ADAM_8BIT, ()),
    "z1-8bit": (zero(1) | ADAM_8BIT, ()),
    "z2-8bit-bf16-offload": (zero(2, **OFFLOAD) | ADAM_8BIT | BF16, ()),
    "z3-8bit": (zero(3) | ADAM_8BIT, ()),
    "pp2-8bit": (zero(1) | ADAM_8BIT, ("--pp=2",)),
    "z1-muon-ema": (zero(1) | MUON, ("--set=train.ema=0.9",)),
    "z3-muon-bf16-ema": (zero(3) | MUON | BF16, ("--set=train.ema=0.9",)),
    "z1-dropout": (zero(1), DROPOUT),
    "z3-dropout-recompute": (zero(3) | RECOMPUTE, DROPOUT),
    "tp2-z1-sequence": (zero(1), ("--tp=2", "--sequence")),
    "tp2-z2-bf16-dropout": (zero(2) | BF16, ("--tp=2", *DROPOUT)),
    "tp2-z3": (zero(3) | TWICE, ("--tp=2",)),
    "cp2-z0": (zero(0), ("--cp=2",)),
    "cp2-z2-bf16-dropout": (zero(2) | BF16, ("--cp=2", *DROPOUT)),
}


def interrupt_and_resume(tiny: Tiny, ranks: int, *flags: str, ds: Path) -> None:
    """A run, and one truncated to step AT and resumed: equal losses, equal final states."""
    whole, part = (tiny.flags(run, *flags, ds=ds) for run in ("whole", "part"))
    outcome = run_ranks(train_all, ranks, [whole])[0][0]
    assert outcome.code == 0, outcome.error
    shutil.copytree(tiny.path("whole"), tiny.path("part"))
    shutil.rmtree(tiny.checkpoint("part", STEPS))
    outcome = run_ranks(train_all, ranks, [[*part, "--resume", "auto"]])[0][0]
    assert outcome.code == 0, outcome.error
    assert f"at step {AT}" in outcome.output
    assert len(tiny.losses("part")) == STEPS
    assert tiny.losses("part") == tiny.losses("whole")
    assert_same_state(tiny.checkpoint("part", STEPS), tiny.checkpoint("whole", STEPS))


QUICK = (
    *("z0-fp32", "z1-fp32", "z2-bf16", "z3-bf16", "z2-bf16-states", "z1-autocast"),
    *("z2-bf16-fp32-sums", "z2-offload", "z2-accumulation", "z3-8bit", "z1-muon-ema"),
    *("z3-muon-bf16-ema", "z3-dropout-recompute", "tp2-z1-sequence", "tp2-z3"),
    "cp2-z2-bf16-dropout",
)
"""Those of `make test`; `make test-all` has all."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MATRIX],
)
def test_resumed_is_uninterrupted(tiny: Tiny, name: str) -> None:
    changes, flags = MATRIX[name]
    interrupt_and_resume(tiny, 2, *flags, ds=tiny.ds(**changes))


def build_operators(world: World, names: list[str]) -> None:
    """Build the operators of these DeepSpeed builders where every later run finds them."""
    for name in names:
        load_operator(name, print)


@pytest.fixture(scope="module")
def compiled_adams() -> None:
    """DeepSpeed's own Adams, compiled: six minutes each on two cores, the first time."""
    run_ranks(build_operators, 1, ["FusedAdamBuilder", "CPUAdamBuilder"], timeout_s=1700)


@pytest.mark.parametrize(
    ("section", "flags"),
    [(zero(0), ()), (zero(2), ()), (zero(3), ()), (zero(1), ("--pp=2",))],
)
def test_a_schedule_may_be_added_and_taken_away(
    tiny: Tiny, section: dict[str, Any], flags: tuple[str, ...]
) -> None:
    without, with_one = tiny.ds("without", **section), tiny.ds("with", **section, **WARMUP)
    again = ["--resume", "auto", *flags]
    runs = [
        tiny.flags("added", "--steps", 2, *flags, ds=without),
        tiny.flags("added", *again, ds=with_one),
        tiny.flags("whole", *flags, ds=with_one),
        tiny.flags("taken", "--steps", 2, *flags, ds=with_one),
        tiny.flags("taken", *again, ds=without),
    ]
    outcomes = run_ranks(train_all, 2, runs)[0]
    assert [outcome.code for outcome in outcomes] == [0] * 5, [o.error for o in outcomes]
    added, whole = (
        [r["learning_rate"] for r in tiny.records(run) if "learning_rate" in r]
        for run in ("added", "whole")
    )
    assert added[2:] == whole[2:] and added[:2] != whole[:2]


OTHER_STATES: dict[str, tuple[dict[str, Any], str, bool]] = {
    # optimizer of the resumed run -> what is said, whether its moments go on
    "amsgrad": (
        {"type": "AdamW", "params": {**ADAM, "amsgrad": True}},
        "begins afresh: max_exp_avg_sq of AdamW",
        True,
    ),
    "Adam": ({"type": "Adam", "params": {**ADAM, "weight_decay": 0.0}}, "", True),
    "SGD": (
        {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
        "the states of SGD begin afresh: the checkpoint has those of AdamW",
        False,
    ),
    "8-bit": (ADAM_8BIT["optimizer"], "the states of AdamW8bit begin afresh", False),
}


def test_another_optimizer(tiny: Tiny) -> None:
    """States that it has go on; others begin afresh, which is said."""
    runs = [tiny.flags("run", "--steps", AT, ds=tiny.ds("AdamW", **zero(1)))]
    for name, (section, _, _) in OTHER_STATES.items():
        ds = tiny.ds(name, **zero(1), optimizer=section)
        source = ("--resume", tiny.checkpoint("run", AT))
        runs.append(tiny.flags(name, *source, "--steps", AT + 2, ds=ds))
    outcomes = run_ranks(train_all, 2, runs)[0]
    assert [outcome.code for outcome in outcomes] == [0] * len(runs), outcomes
    for (name, (_, said, goes_on)), outcome in zip(OTHER_STATES.items(), outcomes[1:], strict=True):
        assert said in outcome.output, name
        assert ("afresh" in outcome.output) == bool(said), name
        updates = read_manifest(tiny.checkpoint(name, AT + 2)).progress.updates
        assert updates == (AT + 2 if goes_on else 0 if name == "SGD" else 2), name


def test_a_path_is_no_pattern(tiny: Tiny) -> None:
    """exp[1] is not exp1, another run."""
    ds = tiny.ds(**zero(1))
    seeds = {"exp1": "5", "run": "6"}
    runs = [tiny.flags(run, "--steps", AT, "--seed", seed, ds=ds) for run, seed in seeds.items()]
    assert all(outcome.code == 0 for outcome in run_ranks(train_all, 2, runs)[0])
    tiny.path("run").rename(tiny.path("exp[1]"))
    source = str(tiny.checkpoint("exp[1]", AT))
    resumed = tiny.flags("again", "--seed", "6", "--resume", source, ds=ds)
    continued = tiny.flags("exp[1]", "--seed", "6", "--resume", "auto", ds=ds)
    whole = tiny.flags("whole", "--seed", "6", ds=ds)
    outcomes = run_ranks(train_all, 2, [resumed, continued, whole])[0]
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    assert tiny.losses("again") == tiny.losses("whole")[AT:]
    assert tiny.losses("exp[1]") == tiny.losses("whole")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("compiled_adams")
@pytest.mark.parametrize("section", [zero(0), zero(1), zero(2, **OFFLOAD), zero(3, **OFFLOAD)])
def test_resumed_with_deepspeeds_own_adam(tiny: Tiny, section: dict[str, Any]) -> None:
    ds = tiny.ds(optimizer={"type": "AdamW", "params": {**ADAM, "torch_adam": False}}, **section)
    interrupt_and_resume(tiny, 2, ds=ds)


@pytest.mark.slow  # compiles DeepSpeed's async_io
@pytest.mark.timeout(700)
def test_resumed_with_nvme(tiny: Tiny, tmp_path: Path) -> None:
    skip_without_libaio()
    run_ranks(build_operators, 1, ["AsyncIOBuilder"], timeout_s=600)
    for number, offload in enumerate(nvme_offloads({"device": "nvme", "nvme_path": str(tmp_path)})):
        for run in ("whole", "part"):
            shutil.rmtree(tiny.path(run), ignore_errors=True)
        ds = tiny.ds(f"nvme{number}", **zero(3, **offload))
        interrupt_and_resume(tiny, 2, "--set=model.d_model=256", ds=ds)


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_may_be_switched_on_and_off(tiny: Tiny, stage: int) -> None:
    inside = tiny.ds("inside", **zero(stage))
    offloaded = tiny.ds("offloaded", **zero(stage, **OFFLOAD))
    again = ["--resume", "auto", "--steps"]
    runs = [
        tiny.flags("run", "--steps", 2, ds=inside),
        tiny.flags("run", *again, 4, ds=offloaded),
        tiny.flags("run", *again, 6, ds=inside),
        tiny.flags("reference", ds=inside),
    ]
    assert [o.code for o in run_ranks(train_all, 2, runs)[0]] == [0] * 4
    run, reference = (dict(tiny.losses(name)) for name in ("run", "reference"))
    assert run == pytest.approx(reference, rel=1e-6)


def test_resumed_plain_engine(tiny: Tiny) -> None:
    ds = tiny.ds(**zero(0), **BF16, **WARMUP)
    interrupt_and_resume(tiny, 1, "--set=train.engine=plain", *DROPOUT, ds=ds)


def test_recomputation_leaves_dropout_as_it_is(tiny: Tiny) -> None:
    runs = [
        tiny.flags("off", *DROPOUT, ds=tiny.ds("off")),
        tiny.flags("on", *DROPOUT, ds=tiny.ds("on", **RECOMPUTE)),
        tiny.flags("none", ds=tiny.ds("off")),
    ]
    assert all(o.code == 0 for o in run_ranks(train_all, 2, runs)[0])
    assert tiny.losses("on") == tiny.losses("off") != tiny.losses("none")


@pytest.fixture(scope="module")
def done(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A finished run on two ranks, for resumes with changes."""
    tiny = Tiny(tmp_path_factory.mktemp("done"), small_data)
    assert run_ranks(train_all, 2, [tiny.flags("done")])[0][0].code == 0
    return tiny


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], str, str, str]] = {
    # changes of the JSON, flags, the name in the message, old value, new value
    "model size": ({}, ("--set=model.d_model=64",), "model.d_model", "32", "64"),
    "layers": ({}, ("--set=model.n_layer=3",), "model.n_layer", "2", "3"),
    "vocabulary": ({}, ("--set=model.vocab_size=401",), "model.vocab_size", "400", "401"),
    "dropout": ({}, ("--set=model.dropout=0.1",), "model.dropout", "0.0", "0.1"),
    "sequence": ({}, ("--set=data.seq_len=16",), "data.seq_len", "32", "16"),
    "order": ({}, ("--set=data.seed=1",), "data.seed", "1234", "1"),
    "seed": ({}, ("--seed=1",), "train.seed", "1234", "1"),
    "global batch": (
        {"train_micro_batch_size_per_gpu": 4}, (), "global batch (samples)", "4", "8"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusals(done: Tiny) -> dict[str, Outcome]:
    """Every refused change, tried in one pair of processes."""
    runs = [
        done.flags("done", *flags, "--resume", "auto", ds=done.ds(f"refused{i}", **changes))
        for i, (changes, flags, *_) in enumerate(REFUSED.values())
    ]
    return dict(zip(REFUSED, run_ranks(train_all, 2, runs)[1], strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_another_run_is_refused(
    refusals: dict[str, Outcome], done: Tiny, name: str
) -> None:
    _, _, what, old, new = REFUSED[name]
    assert refusals[name].code == 2
    assert f"{what}: checkpoint {old}, this run {new}" in refusals[name].error
    assert "\n" not in refusals[name].error
    assert done.checkpoint("done", STEPS).exists()


def test_the_partition_and_sequence_may_change(tiny: Tiny) -> None:
    pipe = ("--pp=2", "--set=model.n_layer=3")
    ds = {
        "pipe": tiny.ds("pipe", **zero(1)),
        "tensor": tiny.ds("tensor", **zero(2), train_micro_batch_size_per_gpu=4),
    }
    again = ("--resume", "auto", "--steps", 4)
    runs = [
        tiny.flags("pipe", *pipe, "--set=parallel.partition=2,1", "--steps", 2, ds=ds["pipe"]),
        tiny.flags("pipe", *pipe, "--set=parallel.partition=1,2", *again, ds=ds["pipe"]),
        tiny.flags("one", *pipe, "--set=parallel.partition=2,1", "--steps", 4, ds=ds["pipe"]),
        tiny.flags("tensor", "--tp=2", "--sequence", "--steps", 2, ds=ds["tensor"]),
        tiny.flags("tensor", "--tp=2", *again, ds=ds["tensor"]),
        tiny.flags("tensor", "--tp=2", "--sequence", *again, "--steps", 6, ds=ds["tensor"]),
        tiny.flags("whole", "--tp=2", "--sequence", ds=ds["tensor"]),
    ]
    outcomes = run_ranks(train_all, 2, runs)[0]
    assert [o.code for o in outcomes] == [0] * len(runs), outcomes
    assert "run.parallel.partition: '2,1' -> '1,2'" in outcomes[1].output
    for mine, other in (("pipe", "one"), ("tensor", "whole")):
        assert dict(tiny.losses(mine)) == pytest.approx(dict(tiny.losses(other)), rel=1e-5)


def test_another_data_set_is_refused(done: Tiny, tmp_path: Path) -> None:
    """Other texts, or the same ones with another tokenizer; but not a copy in another place."""
    texts = write_corpus(tmp_path / "corpus")
    prepare(small_recipe(texts, tokenizer=TokenizerSpec(vocab_size=390)), tmp_path / "tokenizer")
    (texts / "more.txt").write_text("abc " * 200)
    tokenizer = TokenizerSpec(path=str(done.data / "tokenizer.json"))
    prepare(small_recipe(texts, tokenizer=tokenizer), tmp_path / "texts")
    shutil.copytree(done.data, tmp_path / "copy")
    runs = []
    for name in ("texts", "tokenizer", "copy"):
        other = str(tmp_path / name)
        flags = [flag if flag != str(done.data) else other for flag in done.flags("done")]
        runs.append([*flags, "--resume", "auto"])
    *outcomes, copy = run_ranks(train_all, 2, runs)[0]
    for refused in outcomes:
        assert refused.code == 2 and "\n" not in refused.error
        assert (
            ": this run differs: data (fingerprint of the data card): checkpoint" in refused.error
        )
        assert "the --data of before, let it differ with --allow data" in refused.error
    assert copy.code == 0
    assert f"run.data.path: '{done.data}' -> '{tmp_path / 'copy'}'" in copy.output


CHANGES: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0, "betas": [0.5, 0.6], "eps": 1e-2}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_optimizer_settings_may_change_and_do(done: Tiny, tiny: Tiny, stage: int) -> None:
    runs = [tiny.flags("base", "--steps", 2, ds=tiny.ds("base", **zero(stage)))]
    assert run_ranks(train_all, 2, runs)[0][0].code == 0
    runs = []
    for name, value in {"same": None, **CHANGES}.items():
        shutil.copytree(tiny.path("base"), tiny.path(name))
        params = ADAM if value is None else ADAM | {name: value}
        ds = tiny.ds(name, optimizer={"type": "AdamW", "params": params}, **zero(stage))
        runs.append(tiny.flags(name, "--steps", 4, "--resume", "auto", ds=ds))
    outcomes = dict(zip(["same", *CHANGES], run_ranks(train_all, 2, runs)[0], strict=True))
    same = tiny.losses("same")
    for name, value in CHANGES.items():
        key = f"deepspeed.optimizer.params.{name}"
        said = f"changed since the checkpoint: {key}: {ADAM[name]!r} -> {value!r}"
        assert outcomes[name].code == 0 and said in outcomes[name].output
        assert tiny.losses(name)[:3] == same[:3]  # step 3 is computed with the old weights
        assert tiny.losses(name)[3] != same[3], f"{name} had no effect"
    assert tiny.records("lr")[3]["learning_rate"] == CHANGES["lr"]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        *((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")),
        *(
            pytest.param(*p, marks=pytest.mark.slow)
            for p in ((1, "fp32"), (2, "bf16"), (3, "fp32"))
        ),
    ],
)
def test_clipping_may_change_and_does(tiny: Tiny, stage: int, precision: str) -> None:
    sections: dict[str, Any] = zero(stage)
    if precision == "bf16":
        sections |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    # SGD, because Adam ignores the scale of a gradient
    sections["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
    sections["zero_allow_untested_optimizer"] = True
    if stage == 0:
        del sections["zero_allow_untested_optimizer"]
    base = tiny.flags("base", "--steps", 2, ds=tiny.ds("base", **sections))
    assert run_ranks(train_all, 2, [base])[0][0].code == 0
    runs = []
    for name, limit in {"same": 1.0, "clipped": 0.01}.items():
        shutil.copytree(tiny.path("base"), tiny.path(name))
        ds = tiny.ds(name, **sections, gradient_clipping=limit)
        runs.append(tiny.flags(name, "--steps", 4, "--resume", "auto", ds=ds))
    same, clipped = run_ranks(train_all, 2, runs)[0]
    assert same.code == clipped.code == 0
    assert "gradient_clipping: 1.0 -> 0.01" in clipped.output
    assert tiny.losses("clipped")[:3] == tiny.losses("same")[:3]
    assert tiny.losses("clipped")[3] != tiny.losses("same")[3]


def test_a_finished_run_has_nothing_left_to_do(done: Tiny) -> None:
    before = done.losses("done")
    more, fewer, elsewhere = run_ranks(
        train_all,
        2,
        [
            done.flags("done", "--resume", "auto"),
            done.flags("done", "--resume", "auto", "--steps", 2),
            done.flags("new", "--resume", done.path("done")),
        ],
    )[0]
    assert more.code == fewer.code == elsewhere.code == 0
    assert "nothing to report" in elsewhere.output
    assert_same_state(done.checkpoint("new", STEPS), done.checkpoint("done", STEPS))
    assert done.losses("done") == before
    assert not done.path("done").with_name("done.1").exists()


def test_from_another_run_into_this_one(done: Tiny) -> None:
    source = done.path("done")
    flags = done.flags("branch", "--steps", STEPS + 1, "--resume", done.checkpoint("done", AT))
    outcome = run_ranks(train_all, 2, [flags])[0][0]
    assert outcome.code == 0, outcome.error
    # saved at once: a restart with --resume auto does not begin at step 0
    saved = [line for line in outcome.output.splitlines() if "  saved " in line]
    assert saved[0].endswith(str(done.checkpoint("branch", AT)))
    assert [step for step, _ in done.losses("branch")] == [5, 6, 7]
    assert done.losses("branch")[:2] == done.losses("done")[AT:]
    assert done.checkpoint("done", STEPS).exists() and source.exists()


def test_an_earlier_step_is_taken_again(done: Tiny) -> None:
    shutil.copytree(done.path("done"), done.path("back"))
    flags = done.flags("back", "--resume", done.checkpoint("back", AT))
    outcome = run_ranks(train_all, 2, [flags])[0][0]
    assert outcome.code == 0
    assert f"later checkpoints are now step_{STEPS:08d}.old" in outcome.output
    assert done.losses("back") == done.losses("done")
    assert done.checkpoints("back") == done.checkpoints("done")  # no *.old is left


def test_nothing_to_resume_is_an_error_unless_auto(tiny: Tiny) -> None:
    named, auto = run_ranks(
        train_all,
        2,
        [
            tiny.flags("a", "--resume", tiny.path("typo")),
            tiny.flags("b", "--resume", "auto", "--steps", 1),
        ],
    )[0]
    assert named.code == 2 and "typo: does not exist;" in named.error
    assert auto.code == 0 and len(tiny.losses("b")) == 1
    assert f"no checkpoint in {tiny.path('b')}/checkpoints: starting at step 0" in auto.output


def test_the_file_latest_names_a_checkpoint(done: Tiny) -> None:
    """And another run's that is beyond the last step leaves nothing to train."""
    latest = done.path("done") / "checkpoints" / "latest"
    runs = [
        done.flags("on", "--steps", STEPS + 1, "--resume", latest),
        done.flags("short", "--steps", STEPS - 1, "--resume", latest),
    ]
    on, short = run_ranks(train_all, 2, runs)[0]
    assert on.code == 0 and [step for step, _ in done.losses("on")] == [STEPS + 1]
    assert (
        short.code == 2 and f"is of step {STEPS}, the last one is {STEPS - 1}: raise" in short.error
    )
    assert not (done.path("short") / "metrics.jsonl").exists()


def test_an_ended_run_is_extended(tiny: Tiny) -> None:
    """What becomes of the schedule is said; the rates are those of a run of that length."""

    def schedule(total: int | str) -> dict[str, Any]:
        params = {"total_num_steps": total, "warmup_num_steps": 2}
        return {"scheduler": {"type": "WarmupCosineLR", "params": params}}

    cases = {"auto": schedule("auto"), "fixed": schedule(8), "none": {}}
    runs = []
    for name, changes in cases.items():
        ds = tiny.ds(name, **zero(1), **changes)
        for more in (("--steps", 4), ("--steps", 8, "--resume", "auto")):
            runs.append(tiny.flags(name, *more, ds=ds))
        runs.append(tiny.flags(f"{name} at once", "--steps", 8, ds=ds))
    outcomes = run_ranks(train_all, 2, runs)[0]
    assert [o.code for o in outcomes] == [0] * len(runs), outcomes
    said = dict(zip(cases, (outcome.output for outcome in outcomes[1::3]), strict=True))
    what = {
        "auto": "extended from 4 to 8 steps: the schedule (WarmupCosineLR) is now that of 8 steps,"
        " not of 4 (--ds_set scheduler.params.total_num_steps=4: as it was); the learning rate goes"
        " on at 0.0075",
        "fixed": "extended from 4 to 8 steps: the schedule stays as it was (WarmupCosineLR);",
        "none": "the schedule stays as it was (a constant rate); the learning rate goes on at 0.01",
    }
    for name, text in what.items():
        assert text in said[name], said[name]
        rates, at_once = (
            [r["learning_rate"] for r in tiny.records(run)][4:] for run in (name, f"{name} at once")
        )
        assert rates == at_once, name
