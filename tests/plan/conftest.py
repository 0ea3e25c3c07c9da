"""A small model, planned without a GPU or a process group."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fgpt.config.resolve import Resolved, resolve
from tests.config.conftest import GOOD, merged
from tests.run_flags import parse_run_flags

SMALL = {
    "vocab_size": 101,
    "max_seq_len": 32,
    "n_layer": 4,
    "d_model": 16,
    "n_head": 4,
}
BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}

Plan = Callable[..., Resolved]


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


def planned(
    folder: Path, *flags: str, world: int = 1, ds: dict[str, Any] | None = None, **model: Any
) -> Resolved:
    """Resolve a run of a small model for a GPU, whose memory follows from shapes alone."""
    (folder / "ds.json").write_text(json.dumps(merged(merged(GOOD, zero(1)), ds or {})))
    (folder / "run.json").write_text(json.dumps({"model": {**SMALL, **model}}))
    files = ["--ds_config", str(folder / "ds.json"), "--run", str(folder / "run.json")]
    return resolve(parse_run_flags([*files, *flags]), world=world, device="cuda")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return lambda *flags, **options: planned(tmp_path, *flags, **options)
