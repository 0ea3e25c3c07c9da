"""Compares the key tables with the installed DeepSpeed, whose new version may change keys."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from fgpt.config.deepspeed import keys as ds_keys
from fgpt.optim.optimizers import OPTIMIZERS
from fgpt.optim.schedules import REQUIRED_PARAMS, SCHEDULERS
from fgpt.utils.keys import Key


class Recorder(dict[str, Any]):
    """A JSON object that records the keys that DeepSpeed reads."""

    def __init__(self, content: Mapping[str, Any], read: set[str]):
        super().__init__(content)
        self.read = read

    def __reduce__(self) -> Any:
        return Recorder, (dict(self), self.read)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


_DICTS = {
    "activation_checkpointing": {},
    "flops_profiler": {},
    "checkpoint": {},
    "data_types": {},
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "WarmupLR"},
    "timers": {},
}
"""The sections that DeepSpeed reads by name instead of declaring them."""


@pytest.fixture(scope="module")
def reads() -> dict[str, set[str]]:
    """The keys that DeepSpeedConfig reads, by section; "" is the top level."""
    from deepspeed.runtime.config import DeepSpeedConfig

    found: dict[str, set[str]] = {name: set() for name in ("", *_DICTS)}
    sections = {name: Recorder(inner, found[name]) for name, inner in _DICTS.items()}
    DeepSpeedConfig(Recorder({"train_batch_size": 1, **sections}, found[""]))
    return found


def test_top_level(reads: dict[str, set[str]]) -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS

    removed = set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    # The first is read beside a bare "zero_optimization": true only, the second in a process group.
    elsewhere = {"allgather_size", "sequence_parallel_size"}
    assert set(ds_keys.TOP) == reads[""] | removed | elsewhere
    assert all("removed" in ds_keys.TOP[name].refused for name in removed)


def test_batch_is_read_by_name(reads: dict[str, set[str]]) -> None:
    assert set(ds_keys.BATCH) <= reads[""]


@pytest.mark.parametrize("section", sorted(_DICTS))
def test_sections_read_by_name(section: str, reads: dict[str, set[str]]) -> None:
    assert set(ds_keys.TOP[section].keys or {}) == reads[section]


def declared() -> list[tuple[str, Mapping[str, Key], Any]]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime import precision_config as precision
    from deepspeed.runtime.zero import offload_config as offload
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    throughput = ds_keys.TIMERS["throughput"].keys
    assert throughput is not None
    return [
        ("zero_optimization", ds_keys.ZERO, DeepSpeedZeroConfig),
        (
            "offload_optimizer",
            ds_keys.OFFLOAD_OPTIMIZER,
            offload.DeepSpeedZeroOffloadOptimizerConfig,
        ),
        ("offload_param", ds_keys.OFFLOAD_PARAM, offload.DeepSpeedZeroOffloadParamConfig),
        ("fp16", ds_keys.FP16, precision.DeepSpeedFP16Config),
        ("bf16", ds_keys.BF16, precision.DeepSpeedBF16Config),
        ("tensorboard", ds_keys.TENSORBOARD, monitor.TensorBoardConfig),
        ("wandb", ds_keys.WANDB, monitor.WandbConfig),
        ("csv_monitor", ds_keys.CSV_MONITOR, monitor.CSVConfig),
        ("comms_logger", ds_keys.COMMS_LOGGER, CommsLoggerConfig),
        ("timers.throughput", throughput, DeepSpeedThroughputTimerConfig),
    ]


def test_declared_sections() -> None:
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS

    for section, keys, model in declared():
        fields = {name: field for name, field in model.model_fields.items()}
        names = set(fields) | {field.alias for field in fields.values() if field.alias}
        if section == "zero_optimization":
            names |= set(_REMOVED_ZERO_CONFIG_KEYS)
        assert set(keys) == names, section
        by_alias = {field.alias or name: field for name, field in fields.items()}
        for name, key in keys.items():
            if not key.is_checked or key.kind == "section":
                continue
            default = by_alias[name].default
            assert key.default == getattr(default, "value", default), f"{section}.{name}"


def parameters(function: Any, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """Name -> default of a constructor's parameters, without self and what DeepSpeed passes."""
    found = inspect.signature(function).parameters
    skip = {"self", "params", "model_params", "optimizer", *leave_out}
    return {
        name: list(p.default) if isinstance(p.default, tuple) else p.default
        for name, p in found.items()
        if name not in skip
    }


def test_adam_implementations() -> None:
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    constructors = {"torch": torch.optim.AdamW, "cpu": DeepSpeedCPUAdam, "fused": FusedAdam}
    ours = {"torch_adam", "adam_w_mode", "max_grad_norm"}
    for build, constructor in constructors.items():
        # The mode is DeepSpeed's to pass.
        takes = parameters(constructor, ["adamw_mode", "adam_w_mode"])
        keys = OPTIMIZERS["adamw"].keys(build)  # type: ignore[arg-type]
        own = {n for n, key in keys.items() if not key.refused.endswith("does not take it")}
        assert own == set(takes) | ours, build


def test_other_optimizers() -> None:
    import torch
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    of_packages = {name for name, optimizer in OPTIMIZERS.items() if optimizer.package}
    assert set(DEEPSPEED_OPTIMIZERS) | {"sgd"} | of_packages == set(OPTIMIZERS)
    for name, constructor in (
        ("sgd", torch.optim.SGD),
        ("adagrad", torch.optim.Adagrad),
        ("lion", DeepSpeedCPULion),
        ("lamb", FusedLamb),
    ):
        takes = parameters(constructor)
        assert set(OPTIMIZERS[name].params) <= set(takes), name
        assert OPTIMIZERS[name].params["lr"].default == takes["lr"], name


def test_schedulers() -> None:
    from deepspeed.runtime import lr_schedules

    assert set(SCHEDULERS) == set(lr_schedules.VALID_LR_SCHEDULES)
    for name, keys in SCHEDULERS.items():
        takes = parameters(getattr(lr_schedules, name))
        assert set(keys) == set(takes), name
        required = {n for n, default in takes.items() if default is inspect.Parameter.empty}
        assert set(REQUIRED_PARAMS.get(name, ())) == required, name
        for param, key in keys.items():
            if key.default is not None and param in takes:
                assert key.default == takes[param], f"{name}.{param}"


def test_gradient_clipping_default() -> None:
    """DeepSpeed clips at 1.0 by default; FGPT always passes the value."""
    from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

    assert ds_keys.TOP["gradient_clipping"].default == GRADIENT_CLIPPING_DEFAULT
