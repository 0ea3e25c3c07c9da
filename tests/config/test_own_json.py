"""A user's own DeepSpeed JSON: what is dropped, renamed, filled in, and what stays an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgpt.config.deepspeed.settings import value_at
from fgpt.config.fix import fix
from fgpt.config.resolve import Examined, Resolved, RunRequest, examine, resolve
from fgpt.config.run_file import Override
from fgpt.config.show import facts
from fgpt.errors import ConfigError
from tests.config.conftest import GOOD, merged
from tests.config.twins import BF16, TWINS, optimizer, scheduler, stage

FILE = Path("own.json")


def looked_at(ds: dict[str, Any], *, world: int = 1, device: str = "cpu", **more: Any) -> Examined:
    return examine(RunRequest(FILE, deepspeed=ds, **more), world=world, device=device)


def resolved(ds: dict[str, Any], **more: Any) -> Resolved:
    found = looked_at(ds, **more)
    assert found.resolved is not None, [str(issue) for issue in found.issues]
    return found.resolved


def lines(found: Resolved, grade: str) -> list[str]:
    return [str(issue).removeprefix("own.json: ") for issue in found.issues if issue.grade == grade]


HARMLESS: list[tuple[dict[str, Any], str, str | None, Any]] = [
    # JSON beside GOOD, a part of the only warning, the key that has it now, its value
    ({"backend": "nccl"}, "unknown key 'backend' -> dropped", None, None),
    ({"cuda_visible_devices": 0}, "'cuda_visible_devices' -> dropped", None, None),
    ({"qwertz": 1}, "unknown key 'qwertz' -> dropped: DeepSpeed ignores it", None, None),
    ({"timers": {"mine": 1}}, "unknown key 'mine' -> dropped: DeepSpeed ignores it", None, None),
    ({"_comment": "mine"}, '_comment: "mine" -> dropped: it is a comment', None, None),
    ({"_read_the_docs": "x"}, "dropped: it is a comment", None, None),
    (stage(1, _comment="x"), "zero_optimization._comment", None, None),
    ({"bfloat16": {"enabled": True}} | stage(1), "read as bf16", "bf16.enabled", True),
    (
        stage(2, cpu_offload=True),
        "offload_optimizer",
        "zero_optimization.offload_optimizer",
        {"device": "cpu"},
    ),
    (
        stage(3, cpu_offload_param=True),
        "offload_param",
        "zero_optimization.offload_param.device",
        "cpu",
    ),
    (stage(2, cpu_offload=False), "dropped: it asks for nothing", None, None),
    (
        stage(3, max_live_parameters=1e8),
        "read as zero_optimization.stage3_max_live_parameters",
        "zero_optimization.stage3_max_live_parameters",
        100_000_000,
    ),
    (
        stage(3, prefetch_bucket_size=9, stage3_prefetch_bucket_size=8),
        "its present name, is written too",
        "zero_optimization.stage3_prefetch_bucket_size",
        8,
    ),
    (
        {"allgather_size": 1000} | stage(2),
        "allgather_bucket_size",
        "zero_optimization.allgather_bucket_size",
        1000,
    ),
    (stage(1, stage3_gather_16bit_weights_on_model_save=True), "[unread]", None, None),
    ({"elasticity": {"enabled": False, "min_gpus": 8}}, "asks for nothing", None, None),
    ({"curriculum_learning": {"enabled": False}}, "asks for nothing", None, None),
    ({"amp": {"enabled": "auto"}}, "asks for nothing", None, None),
    (
        {"activation_checkpointing": {"contiguous_memory_optimization": True}},
        "contiguous_memory_optimization: true with tp 1 -> dropped",
        "activation_checkpointing",
        {},
    ),
    (stage(3, mics_shard_size=-1), "asks for nothing", None, None),
    (
        scheduler("WarmupLR", warmup_num_steps=5, last_batch_iteration=-1),
        "scheduler.params.last_batch_iteration",
        None,
        None,
    ),
    (
        scheduler("WarmupLR", warmup_num_steps=5, warmup_type="cosine"),
        'takes "log"',
        "scheduler.params.warmup_type",
        "log",
    ),
    (BF16, "stage 1 runs", "zero_optimization.stage", 1),
]


@pytest.mark.parametrize(("ds", "text", "key", "value"), HARMLESS)
def test_harmless_is_accepted_with_one_warning(
    ds: dict[str, Any], text: str, key: str | None, value: Any
) -> None:
    found = resolved(merged(GOOD, ds))
    (line,) = lines(found, "warning")
    assert text in line
    if key:
        assert value_at(found.deepspeed, key) == value
    for name in ds.keys() & {"backend", "cuda_visible_devices", "qwertz", "_comment", "bfloat16"}:
        assert name not in found.deepspeed
    assert lines(resolved(found.deepspeed), "warning") == []


def test_switched_off_features_and_autos_are_notes_only() -> None:
    ds = merged(
        GOOD,
        stage(
            2,
            offload_param={"device": "auto"},
            stage3_gather_16bit_weights_on_model_save=False,
        )
        | {"scheduler": None, "fp16": {"auto_cast": False, "hysteresis": "auto"}},
    )
    ds["tensorboard"] = None
    found = resolved(ds)
    assert lines(found, "warning") == []
    assert (
        'zero_optimization.offload_param.device: "auto" -> DeepSpeed\'s default: "none"'
        in lines(found, "note")
    )


# ---- what is absent ---------------------------------------------------------------------------


def test_an_empty_json_trains() -> None:
    found = resolved({})
    assert found.batch.micro == 8
    tree = found.deepspeed
    assert tree["optimizer"] == {
        "type": "AdamW",
        "params": {
            "lr": 1e-3,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.1,
            "torch_adam": True,
            "fused": True,
        },
    }
    assert tree["scheduler"]["type"] == "WarmupCosineLR"
    assert tree["scheduler"]["params"]["total_num_steps"] == 400
    assert [line.partition(":")[0] for line in lines(found, "note")] == [
        "train_micro_batch_size_per_gpu",
        "optimizer",
        "scheduler",
        "optimizer.params.torch_adam",
    ]
    assert found.origins["deepspeed.optimizer.type"] == "filled in"


def test_a_written_rate_without_a_scheduler_is_constant_as_in_deepspeed() -> None:
    found = resolved({"optimizer": {"type": "AdamW", "params": {"lr": 6e-4}}})
    assert "scheduler" not in found.deepspeed
    assert found.deepspeed["optimizer"]["params"]["lr"] == 6e-4
    found = resolved({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}})
    assert found.deepspeed["scheduler"]["type"] == "WarmupCosineLR"


def test_hugging_face_values() -> None:
    autos = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    for ds in ({}, {"optimizer": {"type": "AdamW", "params": autos}}):
        tree = resolved(ds, auto="hf").deepspeed
        params = tree["optimizer"]["params"]
        assert [params[name] for name in autos] == [5e-5, [0.9, 0.999], 1e-8, 0.0]
        assert tree["scheduler"] == {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": 400,
                "warmup_num_steps": 2,
                "warmup_min_lr": 0.0,
                "warmup_max_lr": 5e-5,
                "warmup_type": "linear",
            },
        }


@pytest.mark.parametrize(
    ("ds", "torch_adam"),
    [
        (optimizer("AdamW"), True),
        (optimizer("Adam", adam_w_mode=False), True),
        (optimizer("AdamW", bias_correction=True), True),
        (optimizer("AdamW", amsgrad=True), True),
        (optimizer("AdamW") | stage(2, offload_optimizer={"device": "cpu"}), True),
        (optimizer("AdamW", torch_adam=False), False),
        (optimizer("AdamW", bias_correction=False), None),
        (optimizer("AdamW") | stage(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), None),
        (optimizer("SGD"), None),
    ],
)
def test_torchs_adam_where_it_computes_the_same(ds: dict[str, Any], torch_adam: bool) -> None:
    found = resolved(merged(GOOD, ds))
    if torch_adam:
        # DeepSpeed's Adams do not decay by default, torch's AdamW does
        assert found.deepspeed["optimizer"]["params"]["weight_decay"] == 0.0
    assert found.deepspeed["optimizer"]["params"].get("torch_adam") is torch_adam
    is_compiled = torch_adam is not True and found.settings.optimizer.is_adam
    assert (found.settings.operator is not None) == is_compiled


def test_autocast_is_named() -> None:
    ds = merged(GOOD, {"torch_autocast": {"enabled": True}})
    found = resolved(ds)
    assert (found.precision, found.deepspeed["torch_autocast"]["dtype"]) == ("fp32", "bfloat16")
    assert dict(facts(found))["precision"].startswith("fp32 weights with bfloat16 autocast, by ")


def flags(**values: Any) -> tuple[Override, ...]:
    keys = {
        "lr": "optimizer.params.lr",
        "micro_batch": "train_micro_batch_size_per_gpu",
        "accumulation": "gradient_accumulation_steps",
        "global_batch": "train_batch_size",
    }
    return tuple(Override(keys[name], value, f"--{name}") for name, value in values.items())


@pytest.mark.parametrize(
    ("ds", "given", "expected"),
    [
        ({}, {"micro_batch": 4}, (4, 1, 8)),
        ({}, {"global_batch": 32}, (8, 2, 32)),
        ({}, {"accumulation": 3}, (8, 3, 48)),
        ({}, {"micro_batch": 4, "accumulation": 3, "global_batch": 24}, (4, 3, 24)),
        ({"train_batch_size": "auto"}, {"micro_batch": 2, "global_batch": 16}, (2, 4, 16)),
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4},
            {"micro_batch": 2},
            (2, 8, 32),
        ),
        (
            {
                "train_batch_size": 32,
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 4,
            },
            {"micro_batch": 8},
            (8, 2, 32),
        ),
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4},
            {"accumulation": 2},
            (4, 2, 16),
        ),
    ],
)
def test_batch_flags(ds: dict[str, Any], given: dict[str, int], expected: tuple[int, ...]) -> None:
    batch = resolved(ds, world=2, deepspeed_flags=flags(**given)).batch
    assert (batch.micro, batch.accumulation, batch.global_size) == expected


def test_the_lr_flag_is_the_peak_of_the_schedule() -> None:
    ds = merged(
        GOOD, scheduler("WarmupDecayLR", total_num_steps=50, warmup_num_steps=5, warmup_max_lr=0.1)
    )
    found = resolved(ds, deepspeed_flags=flags(lr=0.02))
    assert found.deepspeed["scheduler"]["params"]["warmup_max_lr"] == 0.02
    assert found.origins["deepspeed.optimizer.params.lr"] == "flag --lr"
    assert lines(found, "warning") == []
    assert resolved({}, deepspeed_flags=flags(lr=0.02)).settings.get("optimizer.params.lr") == 0.02


def test_the_lr_flag_leaves_muon_lr() -> None:
    schedule = scheduler("WarmupLR", warmup_num_steps=5, warmup_max_lr="auto")
    found = resolved(
        merged(GOOD, optimizer("Muon", muon_lr=0.02) | schedule), deepspeed_flags=flags(lr=0.5)
    )
    assert found.deepspeed["scheduler"]["params"]["warmup_max_lr"] == 0.02
    assert lines(found, "warning") == []
    assert any("muon_lr: 0.02 beside --lr, which does" in note for note in lines(found, "note"))
    rates = "WarmupLR, muon_lr 0.02 of the matrices of blocks, adam_lr 0.5 of the rest"
    assert dict(facts(found))["schedule"].startswith(rates)


def test_muon_without_rates_has_deepspeeds() -> None:
    found = resolved(merged(GOOD, optimizer("Muon", lr=None)))
    params = found.deepspeed["optimizer"]["params"]
    assert (params["muon_lr"], params["adam_lr"]) == (0.02, 3e-4)


# ---- wishes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ds", "world", "expected"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, 2, {"tp": 2}),
        ({"sequence_parallel_size": 2}, 2, {"cp": 2}),
        ({"pipeline": {"stages": 2}}, 2, {"pp": 2}),
        ({"tensor_parallel": {"autotp_size": 0}}, 2, {"tp": 1}),
        ({"tensor_parallel": {"autotp_size": 2}, "pipeline": {"stages": 2}}, 4, {"tp": 2, "pp": 2}),
    ],
)
def test_sizes_become_the_run_files(
    ds: dict[str, Any], world: int, expected: dict[str, int]
) -> None:
    found = resolved(merged(GOOD, ds), world=world)
    for axis, size in expected.items():
        assert getattr(found.run.parallel, axis) == size
        if size > 1:
            assert found.origins[f"run.parallel.{axis}"] == f"file {FILE}"
    assert "tensor_parallel" not in found.deepspeed
    assert "pipeline" not in found.deepspeed


def test_the_flag_comes_before_the_wish() -> None:
    ds = merged(GOOD, {"tensor_parallel": {"autotp_size": 4}})
    found = resolved(ds, world=2, overrides=(Override("parallel.tp", 2, "--tp"),))
    assert found.run.parallel.tp == 2
    assert "tensor_parallel.autotp_size: 4 -> parallel.tp is set by --tp" in lines(found, "note")


def test_compile_and_seed_become_the_run_files(monkeypatch: pytest.MonkeyPatch) -> None:
    on = merged(GOOD, {"compile": {"deepcompile": True}, "seed": 7})
    found = resolved(on, device="cuda")
    assert found.run.speed.compile == "blocks"
    assert found.run.train.seed == 7
    (_, line) = lines(resolved(merged(on, stage(3)), device="cuda"), "warning")[:2]
    found = resolved(merged(on, stage(3)), device="cuda")
    assert found.run.speed.compile == "auto"
    assert any("not compiled because of ZeRO-3" in line for line in lines(found, "warning"))
    assert resolved(merged(GOOD, {"compile": {"enabled": False}})).run.speed.compile == "off"


def test_the_schedule_sets_the_number_of_steps() -> None:
    ds = merged(GOOD, scheduler("WarmupCosineLR", total_num_steps=9000, warmup_num_steps=100))
    assert resolved(ds).run.train.steps == 9000
    assert resolved(ds, overrides=(Override("train.steps", 50, "--steps"),)).run.train.steps == 50


# ---- recomputation ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, {}),
        ({"number_checkpoints": 2}, {"number_checkpoints": 2}),
        ({"partition_activations": True, "profile": False}, {}),
        ({"partition_activations": False, "number_checkpoints": None}, None),
        ({"synchronize_checkpoint_boundary": False, "profile": True}, None),
        (
            {"cpu_checkpointing": False, "contiguous_memory_optimization": False, "profile": False},
            None,
        ),
    ],
)
def test_recomputation_only_where_it_is_asked_for(
    section: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    found = resolved(merged(GOOD, {"activation_checkpointing": section}))
    assert found.settings.checkpointing == expected
    assert resolved(found.deepspeed).settings.checkpointing == expected


def test_a_misspelled_switch_is_no_reason_to_drop_the_section() -> None:
    found = looked_at(merged(GOOD, {"activation_checkpointing": {"partition_activation": False}}))
    assert "did you mean 'partition_activations'?" in str(found.issues[0])


# ---- likely mistakes stay errors --------------------------------------------------------------


@pytest.mark.parametrize(
    ("ds", "text"),
    [
        ({"optimizer": {"name": "SGD", "params": {"lr": 0.1}}}, "unknown key 'name'"),
        ({"optimizer": {"type": "AdamW", "args": {"lr": 0.1}}}, "unknown key 'args'"),
        ({"optimizer": {"params": {"lr": "abc"}}}, 'optimizer.params.lr: "abc" is wrong'),
        ({"optimizer": {"params": {"betaz": [0.9, 0.95]}}}, "did you mean 'betas'?"),
        (
            {"optimizer": {"type": "AdamW", "params": {"learning_rate": 1e-4}}},
            "optimizer.params.lr",
        ),
        ({"scheduler": {"type": "WarmupLR", "args": {}}}, "unknown key 'args'"),
        ({"data_types": {"gradient_dtype": "fp32"}}, "unknown key 'gradient_dtype'"),
        ({"cpu_offload": True}, "'cpu_offload' belongs in zero_optimization"),
        ({"mics_shard_size": 2}, "'mics_shard_size' belongs in zero_optimization"),
        ({"grad_clip": 0.5}, "write it as 'gradient_clipping'"),
        ({"zero_stage": 3}, "write it as 'zero_optimization.stage'"),
        ({"mixed_precision": "bf16"}, "write bf16.enabled or fp16.enabled"),
        ({"offload_params": {"device": "cpu"}}, "did you mean 'zero_optimization.offload_param'?"),
        ({"zero_optimization.stage": 3}, "write sections as nested objects"),
        (stage(2, cpu_offload="maybe"), "must be true or false"),
        (stage(2, cpu_offload=True, offload_optimizer={"device": "none"}), "contradicts"),
        ({"sequence_parallel_size": "2"}, "must be a whole number >= 0"),
        ({"pipeline": {"stage": 2}}, "did you mean 'stages'?"),
        ({"compile": {"enable": True}}, "did you mean 'enabled'?"),
        ({"seed": -1}, "must be a whole number >= 0"),
        ({"train_batch_size": 2**61 - 1}, "and <= 1e+09"),
    ],
)
def test_a_likely_mistake_is_an_error(ds: dict[str, Any], text: str) -> None:
    base = {} if "optimizer" in ds else GOOD
    found = looked_at({**base, **ds})
    errors = [str(issue) for issue in found.issues if issue.grade == "error"]
    assert len(errors) == 1 and text in errors[0], errors


def test_numbers_and_words_are_switches_as_in_deepspeed() -> None:
    for value in (True, 1, "true"):
        found = resolved(merged(GOOD, stage(2, cpu_offload=value)))
        assert found.settings.offloads_optimizer
    for section, on in (({"enabled": False}, False), ({"enabled": True}, True)):
        found = resolved(merged(GOOD, {"activation_checkpointing": section}))
        assert (found.settings.checkpointing is not None) == on
    # a stray key decides nothing
    stray = {"synchronize_checkpoint_boundary": True, "mine": 1}
    assert (
        resolved(merged(GOOD, {"activation_checkpointing": stray})).settings.checkpointing is None
    )


def test_rules_whose_edits_contradict_each_other_end() -> None:
    plain = (Override("train.engine", "plain", "--set"), Override("parallel.pp", 2, "--pp"))
    ds = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    found = looked_at(ds, world=2, overrides=plain)
    assert any("[plain-world]" in str(issue) for issue in found.issues)


def test_deep_nesting_is_one_issue(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text in ('{"x":' * 400 + "1" + "}" * 400, "# deep\n" + '{"x":' * 4000):
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            resolve(RunRequest(file), world=1, device="cpu")
        assert len(caught.value.issues) == 1


# ---- check --fix ------------------------------------------------------------------------------

PARTS = [twin.ds for twins in TWINS.values() for twin in twins if twin.ds]
WRONG: list[dict[str, Any]] = [
    {"gradient_clipp1ng": 1},
    {"gradient_clipping": "1.0"},
    {"zero_optimisation": {"stage": 2}},
    {"overlap_comm": True},
    {"lr": 0.1},
    {"optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 3, "lr": 0.1}}},
    {"optimizer": {"type": "AdamWW"}},
    {"optimizer": {"params": {"betas": [0.9]}}},
    {"scheduler": {"type": "StepLR", "params": {"gamma": 0.1}}},
    {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_max_lr": 1e-3}}},
    {"scheduler": {"type": "OneCycle"}},
    {"bf16": True},
    {"train_batch_size": 7},
    {"train_micro_batch_size_per_gpu": 0},
    {"zero_optimization": {"stage": 9}},
    {"a.b": 1},
]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([*PARTS, *WRONG]), max_size=6),
    st.sampled_from([1, 2, 8]),
    st.sampled_from(["cpu", "cuda"]),
)
def test_what_fix_writes_is_accepted(parts: list[Any], world: int, device: str) -> None:
    """Any combination of issues is mended, and the next check finds nothing to mend."""
    ds = GOOD
    for part in parts:
        ds = merged(ds, part)
    request = RunRequest(FILE, deepspeed=ds)
    try:
        fixed = fix(request, world=world, device=device)
    except ConfigError as error:
        # wishes that this number of processes cannot grant
        assert all(issue.where == "processes" for issue in error.issues), str(error)
        return
    again = RunRequest(Path("fixed.json"), deepspeed=fixed.deepspeed)
    found = examine(again, world=world, device=device)
    assert found.resolved is not None, [str(issue) for issue in found.issues]
    assert [i for i in found.issues if i.grade == "warning" and i.edits] == []
    names = ("optimizer", "zero_optimization", "scheduler", "bf16", "fp16", "gradient_clipping")
    for name in names:
        assert found.resolved.deepspeed.get(name) == fixed.resolved.deepspeed.get(name)


def test_fix_keeps_the_wishes_beside_an_error() -> None:
    ds = merged(GOOD, {"tensor_parallel": {"autotp_size": 2}, "seed": 7, "gradient_cliping": 1})
    fixed = fix(RunRequest(FILE, deepspeed=ds), world=4, device="cpu")
    assert (fixed.resolved.run.parallel.tp, fixed.resolved.run.train.seed) == (2, 7)
    assert ("gradient_clipping", None, 1) in fixed.values


def test_fix_keeps_what_has_effect() -> None:
    ds = merged(
        GOOD,
        stage(2, reduce_bucket_size=1000, stage3_max_live_parameters=5)
        | {"zero_allow_untested_optimizer": True, "amp": {"enabled": True}, "backend": "nccl"},
    )
    fixed = fix(RunRequest(FILE, deepspeed=ds), world=2, device="cpu")
    assert fixed.deepspeed["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert fixed.deepspeed["optimizer"]["params"]["lr"] == 0.001
    assert "train_batch_size" not in fixed.deepspeed  # it depends on the number of processes
    (dropped,) = fixed.issues["dropped as a capability"]
    assert "amp" in str(dropped)
    assert len(fixed.issues["dropped without effect"]) == 3


# ---- files of other programs ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\n",
            "is an accelerate co",
        ),
        ('{"compute_environment": "LOCAL_MACHINE", "deepspeed_config": {}}', "is an accelerate co"),
        ('{"pipe-parallel-size": 1, "optimizer": {}, "num-layers": 12}', "is a GPT-NeoX config"),
        ('# neox\n{\n "pipe-parallel-size": 1, # stages\n "num-layers": 12,\n}', "GPT-NeoX"),
        ('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}', "Hugging Face model"),
        ('{"model": "tiny", "train": {"steps": 9}}', "is a run file of FGPT"),
        ("train_batch_size: 8\nfp16:\n  enabled: true\n", "is YAML, not JSON"),
    ],
)
def test_other_programs_files_are_named_in_one_line(
    text: str, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(RunRequest(file), world=1, device="cpu")
    (issue,) = caught.value.issues
    assert expected in str(issue) and str(file) in str(issue)


def test_comments_and_trailing_commas_are_read_as_deepspeed_does(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(
        '{\n  // mine\n  "train_batch_size": 8, # all\n  "bf16": {"enabled": true,},\n}\n'
    )
    found = resolve(RunRequest(file), world=1, device="cpu")
    assert (found.batch.global_size, found.precision) == (8, "bf16")
    for wrong in (
        '{"train_batch_size": 8, "train_batch_size": 9,}',
        '{"train_batch_size": 8',
        "{,}",
    ):
        file.write_text(wrong)
        with pytest.raises(ConfigError):
            resolve(RunRequest(file), world=1, device="cpu")
