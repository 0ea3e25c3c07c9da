"""Run files, flags, presets, and the origin of each value."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpt.cli.run_flags import with_home
from fgpt.config.deepspeed.keys import TOP
from fgpt.config.deepspeed.settings import walk
from fgpt.config.derive import AUTOS
from fgpt.config.presets import PRESETS
from fgpt.config.resolve import Resolved, resolve
from fgpt.config.run_file import RANGES, leaves, load, to_dict
from fgpt.config.schema import RunConfig
from fgpt.errors import ConfigError
from fgpt.optim.optimizers import OPTIMIZERS
from fgpt.optim.schedules import SCHEDULERS
from fgpt.utils.keys import Key
from tests.config.conftest import GOOD, ROOT, SHIPPED, merged
from tests.run_flags import parse_run_flags

Config = Callable[..., Resolved]
Issues = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("run_file", "expected"),
    [
        ("", "is empty"),
        ("[]", "holds a list, not an object"),
        ('{"model": {"n_layer": 2', "truncated"),
        ({"modle": "tiny"}, "did you mean 'model'?"),
        ({"model": {"n_haed": 4}}, "did you mean 'model.n_head'?"),
        ({"model": {"preset": "gtp2"}}, "did you mean 'gpt2'?"),
        ({"model": "gtp2"}, "did you mean 'gpt2'?"),
        ({"model": 3}, "model: 3 is wrong -> must be an object"),
        ({"model": {"position": "rotray"}}, "did you mean 'rotary'?"),
        ({"model": {"n_layer": "4"}}, 'model.n_layer: "4" is wrong -> must be a whole number >= 1'),
        ({"model": {"n_layer": 4.0}}, "model.n_layer: 4.0 is wrong"),
        ({"model": {"n_layer": True}}, "model.n_layer: true is wrong"),
        ({"model": {"n_layer": None}}, "model.n_layer: null is wrong"),
        ({"run_dir": "a\0b"}, "must not contain the character U+0000"),
        ({"model": {"n_layer": 0}}, "model.n_layer: 0 is wrong"),
        ({"model": {"dropout": 1}}, "model.dropout: 1 is wrong -> must be a number >= 0 and < 1"),
        ({"model": {"bias": 1}}, "model.bias: 1 is wrong -> must be true or false"),
        ({"train": {"steps": 0}}, "train.steps: 0 is wrong"),
        ({"train": {"seed": -1}}, "train.seed: -1 is wrong"),
        ({"checkpoint": {"keep": 1}}, "checkpoint.keep: 1 is wrong"),
        ({"steps": 5}, "'steps' belongs in train"),
        ({"train": {"lr": 0.1}}, "it belongs in the DeepSpeed JSON: optimizer.params.lr"),
        ({"batch_size": 8}, "it belongs in the DeepSpeed JSON: train_batch_size"),
        ({"zero_optimization": {"stage": 1}}, "it belongs in the DeepSpeed JSON: zero_optimiz"),
        ({"qqqq": 1}, "known here: run_dir, model, data, parallel, train"),
        ({"\x1b[31mred": 1}, "run.json: \\x1b[31mred: unknown key"),
    ],
)
def test_refused_run_file(run_file: Any, expected: str, issues: Issues) -> None:
    found = issues(GOOD, run_file=run_file)
    assert len(found) == 1
    assert expected in found[0]


def test_refused_overrides(issues: Issues) -> None:
    found = issues(GOOD, "--set", "model.n_head=x", "--set", "modle.n_head=4", "--steps", "0")
    assert found[0].startswith('--set model.n_head: "x" is wrong -> must be a whole number')
    assert "unknown section 'modle' -> did you mean section 'model'?" in found[1]
    assert found[2].startswith("--steps (train.steps): 0 is wrong")
    assert issues(GOOD, "--set", "model=3")[0].startswith("--set model: 3 is wrong")


def test_a_flag_sets_any_key_of_the_json(config: Config, issues: Issues) -> None:
    found = config(GOOD, "--ds_set", "zero_optimization.stage=2", "--ds-set", "steps_per_print=5")
    assert (found.zero_stage, found.deepspeed["steps_per_print"]) == (2, 5)
    assert found.origins["deepspeed.zero_optimization.stage"] == "flag --ds_set"
    found = config(merged(GOOD, {"gradient_clipping": 0.5}), "--ds_set", "gradient_clipping=null")
    assert found.deepspeed["gradient_clipping"] == 1.0
    (issue,) = issues(GOOD, "--ds_set", "zero_optimization.stage=9")
    assert issue.startswith("--ds_set zero_optimization.stage: 9 is wrong")
    (issue,) = issues(GOOD, "--ds_set", "zero_optimization.stage.x=3")
    assert issue.startswith("--ds_set zero_optimization.stage.x: ")
    for issue in issues(GOOD, "--ds_set", "train.steps=100"):
        assert issue.startswith("--ds_set train.steps: unknown key 'train'")
    (issue,) = issues(GOOD, "--ds_set", "zero_optimization.stge=1")
    assert "did you mean 'stage'?" in issue
    (issue,) = issues(GOOD, "--set", "optimizer.params.lr=0.1")
    assert "--ds_set optimizer.params.lr=..." in issue
    (issue,) = issues(GOOD, "--set", "gradient_clipping=0.1")
    assert "--ds_set gradient_clipping=..." in issue


def test_home_directories(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    run = config(GOOD, "--run_dir", "~/r", "--data", "~/a:0.7, ~/b:0.3").run
    assert (run.run_dir, run.data.path) == ("/home/me/r", "/home/me/a:0.7,/home/me/b:0.3")
    run = config(GOOD, run_file={"run_dir": "~/r", "data": {"path": "a~b"}}).run
    assert (run.run_dir, run.data.path) == ("/home/me/r", "a~b")
    argv = ["--ds_config=~/x.json", "--set=run_dir=~/r", "--set", "sample.prompt=~/x", "~/y"]
    assert with_home(argv) == ["--ds_config=/home/me/x.json", *argv[1:]]


def test_a_rule_names_the_flag(issues: Issues) -> None:
    (found,) = issues(GOOD, "--set", "data.seq_len=300")
    assert found.startswith("--set data.seq_len: 300 is more than model.max_seq_len 256")
    (found,) = issues(GOOD, "--pp", "5", world=5)
    assert found.startswith("--pp (parallel.pp): 5 stages for n_layer 4")


@pytest.mark.parametrize("flag", [["--steps", "x"], ["--set", "steps"], ["--set", "=1"], ["--xyz"]])
def test_malformed_flags_exit_2(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_run_flags(["--ds_config", "x.json", *flag])
    assert caught.value.code == 2
    assert flag[0] in capsys.readouterr().err


def test_all_issues_of_all_sources_in_one_report(issues: Issues) -> None:
    found = issues(
        merged(GOOD, {"gradient_clipp1ng": 1, "zero_optimization": {"stage": 9}}),
        "--set",
        "eval.every=-1",
        run_file={"model": {"n_haed": 3, "n_kv_head": 3}, "trian": {}},
    )
    for part in ("clipp1ng", "stage: 9", "n_haed", "trian", "eval.every"):
        assert sum(part in issue for issue in found) == 1
    assert len(found) == 5  # n_kv_head 3 is not judged against a head count that is in doubt


def test_a_device_file_is_not_read(issues: Issues) -> None:
    with pytest.raises(ConfigError, match="/dev/zero: is no regular file"):
        resolve(parse_run_flags(["--ds_config", "/dev/zero"]), world=1, device="cpu")


def test_missing_files_are_two_issues() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(
            parse_run_flags(["--ds_config", "no.json", "--run", "no2.json"]), world=1, device="cpu"
        )
    assert [issue.where for issue in caught.value.issues] == ["no.json", "no2.json"]


def test_precedence_and_origins(config: Config, tmp_path: Path) -> None:
    resolved = config(
        merged(GOOD, {"gradient_clipping": "auto"}),
        "--steps",
        "7",
        "--set",
        "model.n_layer=3",
        run_file={"model": {"preset": "gpt2", "dropout": 0, "n_layer": 2}, "train": {"steps": 5}},
    )
    run, origins = resolved.run, resolved.origins
    assert (run.model.n_layer, run.train.steps, run.model.d_model) == (3, 7, 768)
    assert origins["run.model.n_layer"] == "flag --set"
    assert origins["run.train.steps"] == "flag --steps"
    assert origins["run.model.d_model"] == "preset gpt2"
    assert origins["run.model.preset"] == f"file {tmp_path / 'run.json'}"
    assert origins["run.model.dropout"] == f"file {tmp_path / 'run.json'}"
    assert origins["run.train.seed"] == "default"
    assert origins["run.model.d_head"] == "derived: d_model / n_head"
    assert origins["deepspeed.optimizer.params.lr"] == f"file {tmp_path / 'ds.json'}"
    assert origins["deepspeed.gradient_clipping"] == "derived: auto = 1.0"
    assert origins["deepspeed.zero_optimization.stage"] == "default"
    assert origins["deepspeed.train_batch_size"].startswith("derived: ")
    assert isinstance(run.model.dropout, float)


def test_every_leaf_has_an_origin() -> None:
    for file in SHIPPED:
        resolved = resolve(parse_run_flags(["--ds_config", str(file)]), world=2, device="cuda")
        expected = {f"run.{path}" for path, _ in leaves()} | {
            f"deepspeed.{path}"
            for path, _, value in walk(resolved.deepspeed)
            if not isinstance(value, dict)
        }
        assert set(resolved.origins) == expected


def test_nothing_derivable_is_left_none(config: Config) -> None:
    for preset in PRESETS:
        run = config(GOOD, "--model", preset).run
        off = {"window", "window_pattern", "logit_softcap", "mup_base", "mup_base_d_head"}
        assert {name for name, value in to_dict(run.model).items() if value is None} == off
        assert run.data.seq_len == run.model.max_seq_len
        assert run.run_dir == f"runs/{preset}-ds"


@pytest.mark.parametrize(
    ("preset", "d_ff", "d_head"),
    [("tiny", 1024, 64), ("gpt2", 3072, 64), ("llama-tiny", 704, 64), ("seed-1m", 64, 64)],
)
def test_derived_shapes(preset: str, d_ff: int, d_head: int, config: Config) -> None:
    model = config(GOOD, "--model", preset).run.model
    assert (model.d_ff, model.d_head) == (d_ff, d_head)


def test_short_flags_and_their_spellings(config: Config, tmp_path: Path) -> None:
    ds = tmp_path / "x.json"
    ds.write_text(json.dumps(GOOD))
    request = parse_run_flags(
        ["--ds-config", str(ds), "--run-dir", "a", "--model", "gpt2", "--data", "d", "--seed", "3"]
    )
    run = resolve(request, world=1, device="cpu").run
    assert (run.run_dir, run.model.preset, run.data.path, run.train.seed) == ("a", "gpt2", "d", 3)
    assert parse_run_flags(["--ds_config", "x", "--run_dir", "a"]).overrides[0].value == "a"


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--sequence"], True),
        (["--sequence", "true"], True),
        (["--sequence", "--set", "parallel.sequence=false"], False),
        (["--sequence", "false"], False),
        ([], False),
    ],
)
def test_a_flag_without_a_value_is_true(flags: list[str], value: bool, config: Config) -> None:
    run = config(GOOD, "--tp", "2", *flags, "--cp", "2", world=4).run
    assert run.parallel.sequence is value
    assert (run.parallel.tp, run.parallel.cp) == (2, 2)


def test_a_flag_takes_true_or_false_only(issues: Issues) -> None:
    (found,) = issues(GOOD, "--sequence", "yes", "--tp", "2", world=2)
    assert found.startswith('--sequence (parallel.sequence): "yes" is wrong -> must be true or')


@pytest.mark.parametrize(
    ("text", "value"),
    [("def f(", "def f("), ('"7"', "7"), ("", ""), ("auto", "auto"), ("a=b", "a=b")],
)
def test_set_values(text: str, value: str, config: Config) -> None:
    assert config(GOOD, "--set", f"sample.prompt={text}").run.sample.prompt == value


def test_model_shorthands_agree(config: Config) -> None:
    runs = [
        config(GOOD, run_file={"model": "gpt2"}),
        config(GOOD, run_file={"model": {"preset": "gpt2"}}),
        config(GOOD, "--model", "gpt2"),
        config(GOOD, "--set", "model=gpt2"),
        config(GOOD, "--set", 'model={"preset": "gpt2"}'),
    ]
    assert len({run.fingerprint() for run in runs}) == 1


def test_fingerprint_is_of_the_values(config: Config) -> None:
    base = config(GOOD).fingerprint()
    assert config(GOOD, "--steps", "400").fingerprint() == base
    assert config(GOOD, "--steps", "401").fingerprint() != base
    assert config(GOOD, world=2).fingerprint() != base


@given(st.sampled_from(sorted(dict(leaves()))))
def test_every_field_can_be_written_as_it_is(path: str) -> None:
    """Each default of the dataclasses fits the type and range of its own field."""
    section, _, name = path.partition(".")
    value: Any = to_dict(RunConfig())[section]
    assert dict(leaves())[path].complaint(value[name] if name else value) is None


def test_every_number_has_a_range() -> None:
    numbers = {path for path, key in leaves() if key.kind in ("int", "number")}
    assert numbers == set(RANGES) - {"model.preset"}


def test_leaves_are_the_dataclasses_fields() -> None:
    def names(kind: Any, path: str = "") -> list[str]:
        return [
            name
            for f in fields(kind)
            for name in (
                names(getattr(kind, f.name), f"{path}{f.name}.")
                if is_dataclass(getattr(kind, f.name))
                else [path + f.name.rstrip("_")]  # async is a word of Python
            )
        ]

    assert [path for path, _ in leaves()] == names(RunConfig())


def test_every_auto_is_resolved() -> None:
    """Each key that takes "auto" is in AUTOS or one of the batch triple."""

    def below(keys: dict[str, Key], path: str) -> set[str]:
        found = {f"{path}{name}" for name, key in keys.items() if key.auto}
        for name, key in keys.items():
            found |= below(dict(key.keys or {}), f"{path}{name}.")
        return found

    autos = below(dict(TOP), "")
    for optimizer in OPTIMIZERS.values():
        autos |= below(dict(optimizer.params), "optimizer.params.")
    for params in SCHEDULERS.values():
        autos |= below(dict(params), "scheduler.params.")
    batch = {name for name in autos if "batch_size" in name or "accumulation" in name}
    assert autos - batch == set(AUTOS)
    assert len(batch) == 3


def test_autos(config: Config) -> None:
    ds = {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": "auto",
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": "auto",
                "warmup_num_steps": "auto",
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
            },
        },
    }
    resolved = config(ds, "--steps", "100", world=2, device="cuda")
    tree = resolved.deepspeed
    assert (resolved.precision, resolved.zero_stage) == ("bf16", 3)
    assert (tree["train_batch_size"], tree["gradient_accumulation_steps"]) == (8, 1)
    assert tree["scheduler"]["params"] == {
        "total_num_steps": 100,
        "warmup_num_steps": 50,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 0.001,
    }
    zero = tree["zero_optimization"]
    assert zero["reduce_bucket_size"] == 256 * 256
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 256 * 256)
    assert zero["stage3_param_persistence_threshold"] == 2560
    assert config(ds, device="cpu").precision == "fp32"


def test_the_optimizer_gets_its_capitals(config: Config) -> None:
    ds = merged(GOOD, {"optimizer": {"type": "adamw"}})
    assert config(ds).deepspeed["optimizer"]["type"] == "AdamW"


def test_example_run_files() -> None:
    files = sorted((ROOT / "launchers" / "runs").glob("*.json"))
    assert [file.stem for file in files] == [
        "gpt2",
        "llama-tiny",
        "mini",
        "pretrained",
        "tiny",
        "tutorial",
    ]
    for file in files:
        assert load(file, ()).issues == []


def test_config_imports_quickly_and_without_torch() -> None:
    code = (
        "import sys, fgpt.config.resolve, fgpt.cli.run_flags;"
        "bad = {'torch', 'deepspeed', 'numpy', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("written", "flags", "expected"),
    [
        ({"mup": {"base": 128, "base_d_head": 32}}, (), (128, 32)),
        ({"mup_base": 64}, ("--set", 'model.mup={"base": 128}'), (128, None)),
        ({"mup": {"base": 128}}, ("--set", "model.mup_base=64"), (64, None)),
        ({"mup_base_d_head": 32}, ("--set", "model.mup.base=64"), (64, 32)),
        ({"mup": {"base": 64}}, ("--set", 'model={"mup": {"base_d_head": 16}}'), (64, 16)),
    ],
)
def test_spellings_of_mup(
    config: Config,
    tmp_path: Path,
    written: dict[str, Any],
    flags: tuple[str, ...],
    expected: tuple[int, int],
) -> None:
    """A flag wins over the run file in any of them."""
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"model": written}))
    model = config(GOOD, "--run_file", str(file), *flags).run.model
    assert (model.mup_base, model.mup_base_d_head) == expected


def test_two_spellings_of_mup_in_one_file(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text('{"model": {"mup": {"base": 128}, "mup_base": 64}}')
    with pytest.raises(ConfigError, match=r"model\.mup_base: 64, and .* has another value"):
        config(GOOD, "--run_file", str(file))
