"""The DeepSpeed JSON's keys and values: each shipped file, and each way to misspell it."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgpt.config.deepspeed.check import check
from fgpt.config.deepspeed.keys import TOP
from fgpt.config.deepspeed.settings import keys_of, walk
from fgpt.config.resolve import Resolved, RunRequest, resolve
from fgpt.errors import ConfigError
from fgpt.utils.keys import Key
from tests.config.conftest import GOOD, SHIPPED, merged

DEVICES = {"fp16": ("cuda",)}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
@pytest.mark.parametrize("world", [1, 2, 8])
def test_shipped_configs_are_accepted(file: Path, world: int) -> None:
    for device in DEVICES.get(file.stem, ("cpu", "cuda")):
        resolved = resolve(RunRequest(file), world=world, device=device)
        assert resolved.batch.global_size == 8 * world
        assert "auto" not in json.dumps(resolved.deepspeed)


def test_the_shipped_configs() -> None:
    names = "bf16 fp16 muon muon_fp32 zero0 zero1 zero2 zero2_offload zero3 zero3_offload"
    assert [file.stem for file in SHIPPED] == names.split()


def test_fp16_on_a_cpu_is_one_line() -> None:
    (file,) = (file for file in SHIPPED if file.stem == "fp16")
    with pytest.raises(ConfigError) as caught:
        resolve(RunRequest(file), world=1, device="cpu")
    (issue,) = caught.value.issues
    assert "Type fp16 is not supported" in str(issue)


def sections(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, section) of a JSON, itself included."""
    yield "", tree
    for path, _, value in walk(tree):
        if isinstance(value, dict):
            yield path, value


def misspellings(name: str) -> list[str]:
    middle = len(name) // 2
    return [
        name + name[-1],
        name[:middle] + name[middle + 1 :] if len(name) > 3 else name + "_",
        name[:middle] + "x" + name[middle + 1 :] if len(name) > 3 else name + "x",
        name.capitalize(),
    ]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_each_misspelled_key_is_refused_with_its_name(file: Path) -> None:
    original = json.loads(file.read_text())
    count = 0
    for path, section in sections(original):
        for name in section:
            for wrong in misspellings(name):
                tree = json.loads(json.dumps(original))
                part = tree
                for step in path.split(".") if path else ():
                    part = part[step]
                part[wrong] = part.pop(name)
                issues = [str(issue) for issue in check(tree, "x").issues]
                assert any(f"{wrong!r}" in f and f"{name!r}" in f for f in issues), (path, wrong)
                count += 1
    assert count > 60


def all_keys(keys: Any = TOP, path: str = "") -> Iterator[tuple[str, Key]]:
    for name, key in keys.items():
        inner = f"{path}.{name}" if path else name
        yield inner, key
        if key.keys:
            yield from all_keys(key.keys, inner)


CHECKED = [(path, key) for path, key in all_keys() if key.is_checked]
WRONG: dict[str, list[Any]] = {
    "bool": [0, 1, "true", None, [], {}],
    "int": [True, "2", 2.5, 2.0, [], {}],
    "count": [True, "2", 2.5, [], {}],
    "number": [True, "1.0", [], {}],
    "string": [1, True, [], {}],
    "strings": ["a", [1], {}],
    "section": [1, True, "x", []],
}


@pytest.mark.parametrize(("path", "key"), CHECKED, ids=[path for path, _ in CHECKED])
def test_each_key_refuses_other_types(path: str, key: Key) -> None:
    for value in [*WRONG[key.kind], float("nan"), float("inf")]:
        if value is None and key.null:
            continue
        *outer, name = path.split(".")
        tree: dict[str, Any] = {name: value}
        for section in reversed(outer):
            tree = {section: tree}
        issues = [issue for issue in check(tree, "x").issues if issue.where == f"x: {path}"]
        assert len(issues) == 1, (path, value)


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ({"gradient_clipping": -1}, "gradient_clipping: -1 is wrong -> must be a number >= 0"),
        ({"gradient_clipping": "1.0"}, 'gradient_clipping: "1.0" is wrong'),
        ({"zero_optimization": {"stage": 9}}, "zero_optimization.stage: 9 is wrong"),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage: "2" is wrong'),
        ({"zero_optimization": True}, "zero_optimization: true is wrong -> must be an object"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu: 0 is wrong"),
        ({"train_micro_batch_size_per_gpu": 2.5}, "train_micro_batch_size_per_gpu: 2.5 is wrong"),
        ({"gradient_clipp1ng": 1}, "unknown key 'gradient_clipp1ng' -> did you mean 'gradient_cl"),
        ({"zero_optimisation": {"stage": 3}}, "did you mean 'zero_optimization'?"),
        ({"overlap_comm": True}, "'overlap_comm' belongs in zero_optimization"),
        ({"lr": 0.1}, "'lr' belongs in optimizer.params"),
        ({"total_num_steps": 10}, "'total_num_steps' belongs in scheduler.params"),
        ({"fp16": {"qwertz": 1}}, "unknown key 'qwertz' -> delete it; known here: enabled, loss"),
        ({"optimizer": {"type": "AdamWW"}}, "did you mean 'AdamW'?"),
        ({"optimizer": {"type": "OneBitAdam"}}, "must be one of AdamW, Adam, SGD"),
        ({"optimizer": {"params": {"betas": [0.9]}}}, "must be a list of two numbers"),
        ({"optimizer": {"params": {"betas": [0.9, 1.0]}}}, "optimizer.params.betas: [0.9, 1.0]"),
        ({"optimizer": {"params": {"beta": [0.9, 0.95]}}}, "did you mean 'betas'?"),
        ({"optimizer": {"params": {"lr": 0}}}, "must be a number > 0 or 'auto'"),
        ({"optimizer": {"params": {"amsgrad": "auto"}}}, "cannot be 'auto'"),
        ({"scheduler": {"type": "WarmupCosLR"}}, "did you mean 'WarmupCosineLR'?"),
        ({"scheduler": {"type": "StepLR"}}, "must be one of WarmupLR"),
        (
            {
                "scheduler": {
                    "type": "WarmupLR",
                    "params": {"warmup_num_steps": 9, "warmup_ratio": 1},
                }
            },
            "'warmup_ratio'",
        ),
        ({"checkpoint": {"tag_validation": "loud"}}, "must be one of Ignore, Warn, Fail"),
    ],
)
def test_refused(patch: dict[str, Any], expected: str, issues: Callable[..., list[str]]) -> None:
    found = issues(merged(GOOD, patch))
    assert len(found) == 1
    assert expected in found[0]


def test_bucket_sizes_may_be_floats(config: Callable[..., Resolved]) -> None:
    ds = merged(GOOD, {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}})
    size = config(ds).deepspeed["zero_optimization"]["reduce_bucket_size"]
    assert size == 500_000_000 and isinstance(size, int)


def test_parameters_beside_a_misspelled_type_are_checked(
    issues: Callable[..., list[str]],
) -> None:
    found = issues(merged(GOOD, {"optimizer": {"type": "AdamV", "params": {"lr": "2"}}}))
    assert len(found) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(string.ascii_lowercase, max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
PLACES = [path for path, _ in all_keys()] + ["optimizer.params.lr", "scheduler.params.x", "x"]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(PLACES), JSON, max_size=5), st.booleans())
def test_any_json_is_accepted_or_refused_by_faults_only(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], good: bool
) -> None:
    """Any JSON gives a Resolved or a ConfigError, never another exception."""
    tree = json.loads(json.dumps(GOOD if good else {}))
    for path, value in values.items():
        *outer, name = path.split(".")
        part = tree
        for section in outer:
            part = part.setdefault(section, {}) if isinstance(part, dict) else {}
        if isinstance(part, dict):
            part[name] = value
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(tree))
    try:
        resolved = resolve(RunRequest(file), world=2, device="cpu")
    except ConfigError as error:
        assert error.issues and error.exit_code == 2
    else:
        assert keys_of("", resolved.deepspeed) is TOP
        json.dumps(resolved.to_json(), allow_nan=False)
