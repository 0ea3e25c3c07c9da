"""The size of checkpoints, and the memory of saving in the background."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fgpt.checkpoint.manifest import read_manifest
from fgpt.checkpoint.size import (
    checkpoint_bytes,
    copy_bytes,
    describe_saving,
    why_not_in_background,
)
from fgpt.config.resolve import Resolved, RunRequest, resolve
from fgpt.config.run_file import Override
from tests.ranks import run_ranks
from tests.tiny import ADAM, Tiny, train_all

BF16_STATES = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
NVME = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}
# DeepSpeed JSON -> bytes per parameter
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "fp32": ({}, 12),
    "bf16": ({"bf16": {"enabled": True}}, 12),
    "bf16 states": ({"bf16": {"enabled": True, **BF16_STATES}}, 6),
    "8-bit": ({"optimizer": {"type": "AdamW8bit", "params": {}}}, 6),
    "amsgrad": ({"optimizer": {"type": "AdamW", "params": {**ADAM, "amsgrad": True}}}, 16),
}


def resolved(changes: dict[str, Any], *overrides: Override) -> Resolved:
    ds = {"train_batch_size": 8, "zero_optimization": {"stage": 2}} | changes
    request = RunRequest(Path("a.json"), deepspeed=ds, overrides=overrides)
    return resolve(request, world=4, device="cpu")


@pytest.mark.parametrize("name", SIZES)
def test_bytes_per_parameter(name: str) -> None:
    from fgpt.model.count import n_params

    changes, size = SIZES[name]
    run = resolved(changes)
    assert checkpoint_bytes(run) == size * n_params(run.run.model)
    assert copy_bytes(run, 2) == checkpoint_bytes(run) // 2


def test_what_check_says() -> None:
    run = resolved({})
    gib = checkpoint_bytes(run) / 2**30
    text = describe_saving(run)
    assert text.startswith(f"{gib:.3g} GiB each; written while training goes on")
    assert text.endswith(f"take {gib / 4:.3g} GiB of host memory per rank")
    off = resolved({}, Override("checkpoint.async", False, "--set"))
    assert "checkpoint.async is false" in describe_saving(off)
    assert "NVMe" in why_not_in_background(resolved({"zero_optimization": NVME}))


@pytest.mark.dist
def test_the_estimate_is_what_is_written(tiny: Tiny) -> None:
    """Beside the tensors a file has its header."""
    ds = tiny.ds()
    assert run_ranks(train_all, 2, [tiny.flags("run", ds=ds)])[0][0].code == 0
    files = read_manifest(tiny.checkpoint("run", 6)).files
    from tests.run_flags import parse_run_flags

    run = resolve(parse_run_flags(tiny.flags("run", ds=ds)), world=2, device="cpu")
    written = sum(file.size_bytes for file in files)
    assert checkpoint_bytes(run) < written < checkpoint_bytes(run) + 20_000


@pytest.mark.dist
def test_copies_that_do_not_fit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for: refused. By default: a warning, and training waits for each save."""
    runs = [tiny.flags("asked", "--set=checkpoint.async=true"), tiny.flags("default")]
    asked, default = run_ranks(train_without_memory, 2, runs)[0]
    assert asked.code == 2 and "checkpoint.async: the copies of the state need" in asked.error
    assert "leave it out, or set it to false" in asked.error and "\n" not in asked.error
    assert default.code == 0 and "training waits for each save" in default.output
    saved, step3 = (
        default.output.index(text) for text in ("step      2/6  saved", "step      6/6")
    )
    assert saved < step3


def train_without_memory(world: Any, runs: list[list[str]]) -> Any:
    """Train on a machine with a thousand free bytes."""
    psutil.virtual_memory = lambda: SimpleNamespace(available=1000, total=2**34)
    return train_all(world, runs)
