"""Helpers that write JSON files, resolve them, and collect the issues."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fgpt.config.resolve import Resolved, resolve
from fgpt.errors import ConfigError
from tests.run_flags import parse_run_flags

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))

GOOD: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}},
}
"""A minimal valid DeepSpeed JSON."""


def merged(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """Merge `patch` into a copy of `base`, section by section; None deletes a key."""
    result = copy.deepcopy(base)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Resolved]:
    """resolve() of a DeepSpeed JSON given as a dict or as text, and of flags."""

    def run(
        ds: dict[str, Any] | str,
        *flags: str,
        run_file: dict[str, Any] | str | None = None,
        world: int = 1,
        device: str = "cpu",
    ) -> Resolved:
        argv: Sequence[str] = ["--ds_config", str(write(tmp_path / "ds.json", ds)), *flags]
        if run_file is not None:
            argv = [*argv, "--run", str(write(tmp_path / "run.json", run_file))]
        return resolve(parse_run_flags(argv), world=world, device=device)

    return run


@pytest.fixture
def issues(config: Callable[..., Resolved]) -> Callable[..., list[str]]:
    """The issues of a configuration as printed; an empty list if there are none."""

    def run(*args: Any, **kwargs: Any) -> list[str]:
        try:
            config(*args, **kwargs)
        except ConfigError as error:
            return [str(issue) for issue in error.issues]
        return []

    return run


def write(path: Path, content: dict[str, Any] | str) -> Path:
    """Write a JSON file, or text unchanged."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path
