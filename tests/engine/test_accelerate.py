"""accelerate's settings cannot override the checked JSON."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest import mock

import pytest
from accelerate import DeepSpeedPlugin

from fgpt.distributed.launch import World, launched_by_accelerate
from fgpt.engine.deepspeed.accelerate import check_same_json, plugin_class, prepare
from fgpt.errors import ConfigError, LaunchError


def test_it_announces_itself() -> None:
    assert launched_by_accelerate({"ACCELERATE_USE_DEEPSPEED": "true"})
    assert not launched_by_accelerate({"ACCELERATE_USE_DEEPSPEED": "false"})
    assert not launched_by_accelerate({})


def test_the_check_same_json_in_two_files_is_the_same(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps({"a": 1, "b": 2}))
    two.write_text(json.dumps({"b": 2, "a": 1}, indent=1))
    named = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(one)}
    check_same_json(named, two)
    check_same_json({}, two)  # named on --ds_config only
    two.write_text(json.dumps({"a": 1}))
    with pytest.raises(ConfigError, match="name the same DeepSpeed JSON in both"):
        check_same_json(named, two)
    with pytest.raises(ConfigError, match="name the same DeepSpeed JSON in both"):
        check_same_json({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "gone")}, two)


@pytest.mark.parametrize(("told", "said"), [("bf16", "fp32"), ("fp16", "bf16")])
def test_another_precision_is_refused(told: str, said: str) -> None:
    """accelerate would write it into a JSON that has no bf16 block, after it was checked."""
    with mock.patch.dict("os.environ", ACCELERATE_MIXED_PRECISION=told):
        with pytest.raises(LaunchError, match=f"mixed_precision is {told}.*JSON.s {said}"):
            prepare(mock.Mock(), [], {}, World(), said)


def test_transformers_is_not_needed() -> None:
    """The packages of `make train` do not include it; accelerate's own plugin asks for it."""
    absent = mock.patch(
        "accelerate.utils.dataclasses.compare_versions", side_effect=PackageNotFoundError
    )
    with absent, mock.patch.dict("os.environ"):  # accelerate sets variables
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
        plugin = plugin_class()(hf_ds_config=config, zero3_init_flag=False)
        plugin.set_deepspeed_weakref()
        assert isinstance(plugin, DeepSpeedPlugin)
        with pytest.raises(PackageNotFoundError):
            DeepSpeedPlugin.set_deepspeed_weakref(plugin)
