"""What is checked before a run writes to NVMe; the runs are in test_own_json and test_resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fgpt.config.resolve import Resolved, RunRequest, resolve
from fgpt.engine.deepspeed.nvme import buffer_bytes, check_buffers, nvme_bytes
from fgpt.errors import LaunchError
from fgpt.model.count import n_params


def resolved(tmp_path: Path, **offloads: dict[str, Any]) -> Resolved:
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    zero = {name: {**nvme, **keys} for name, keys in offloads.items()}
    ds = {"train_batch_size": 8, "zero_optimization": {"stage": 3, **zero}}
    return resolve(RunRequest(Path("a.json"), deepspeed=ds), world=2, device="cpu")


def test_bytes_on_disk(tmp_path: Path) -> None:
    """fp32 weights; master weights, gradients and Adam's two states in fp32."""
    both = resolved(tmp_path, offload_param={}, offload_optimizer={})
    (size,) = nvme_bytes(both, share=0.5).values()
    assert size == (4 + 16) * n_params(both.run.model) // 2


def test_buffers_must_fit_into_memory(tmp_path: Path) -> None:
    fits = resolved(tmp_path, offload_optimizer={"buffer_count": 5})
    shard = -(-n_params(fits.run.model) // 2)
    key = "zero_optimization.offload_optimizer.buffer_count"
    assert buffer_bytes(fits, local_size=2) == {key: 5 * 4 * shard * 2}
    check_buffers(buffer_bytes(fits, local_size=2))
    many = resolved(tmp_path, offload_optimizer={"buffer_count": 10**9})
    with pytest.raises(LaunchError, match=rf"{key}: the buffers need .* GiB of free memory: lower"):
        check_buffers(buffer_bytes(many, local_size=2))
    large = resolved(tmp_path, offload_param={"buffer_size": 10**12})
    with pytest.raises(LaunchError, match="lower it or buffer_size"):
        check_buffers(buffer_bytes(large, local_size=2))
