"""Published runs as planned runs: what a row says, and what is filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fgpt.errors import UserError
from fgpt.model.count import n_params
from fgpt.plan.published import published_run, read_published

BLOOM: dict[str, Any] = {
    "id": "a", "set": "s", "quality": "A", "gpu": "A100-SXM4-80GB", "gpu_mem_gb": 80,
    "gpus": 384, "gpus_per_node": 8, "framework": "Megatron-DeepSpeed (bigscience)",
    "interconnect": "NVLink in the node, 4 Omni-Path links a node (Jean Zay)", "model": "GPT",
    "n_layer": 70, "d_model": 14336, "n_head": 112, "n_kv_head": 112, "d_ff": 57344,
    "activation": "gelu", "norm": "layernorm", "position": "alibi", "tied_head": True,
    "vocab": 250880, "seq_len": 2048, "tp": 4, "pp": 12, "cp": 1, "dp": 8, "zero": 1,
    "sharding": "ZeRO-1", "micro_batch": 2, "accum": 128, "global_batch": 2048,
    "precision": "bf16 mixed", "activation_checkpointing": "full", "step_s": 105.0,
    "memory_gb": 60.0, "memory_kind": "nvidia-smi",
    "grad_dtype": "fp32 (BF16_Optimizer, not sharded)",
    "pp_partition": "embedding and head each count as a layer (type:transformer|embedding)",
}  # fmt: skip
FSDP = BLOOM | {
    "framework": "llm-foundry/Composer, torch FSDP", "sharding": "FSDP FULL_SHARD", "zero": 3,
    "tp": 1, "pp": 1, "dp": 384, "attention": "flash", "precision": "bf16 / PURE",
    "interconnect": "1600 Gb/s RoCE a node",
}  # fmt: skip


def test_a_row_of_megatron_deepspeed() -> None:
    published = published_run(BLOOM)
    run = published.run
    assert (run.ranks, run.global_batch, run.engine, run.zero_stage) == (384, 2048, "deepspeed", 1)
    assert n_params(run.model) / 1e9 == pytest.approx(176.2, abs=0.5)
    assert (run.model.attention, run.recompute, run.gradient_bytes) == ("reference", "full", 4)
    assert published.cluster.network_gbit_s == 400 and published.cluster.nodes == 48
    assert (published.step_s, published.memory_gb, published.memory_gib) == (105.0, 60.0, None)
    # 70 blocks, embedding and head: six layers on each of 12 stages
    assert [len(stage) for stage in run.stages()] == [6, *[6] * 10, 7]  # with the final norm


def test_a_row_of_fsdp() -> None:
    run = published_run(FSDP).run
    assert (run.engine, run.zero_stage, run.reduced_bytes) == ("fsdp", 3, 2)
    assert run.model.attention == "sdpa" and run.model.dropout == 0
    assert published_run(FSDP).cluster.network_gbit_s == 1600


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"sharding": "optimizer states over 8 ranks"}, "shards", 8),
        ({"sharding": "FSDP hybrid shard (in the node)"}, "shards", 8),
        ({"activation_checkpointing": "none (llama.yaml: null)"}, "recompute", "none"),
        ({"activation_checkpointing": "selective (nemotron)"}, "recompute", "attention"),
        ({"activation_checkpointing": "selective (every 2nd layer)"}, "recomputed_share", 0.5),
        ({"precision": "fp8 (Transformer Engine)"}, "precision", "fp8"),
        ({"optimizer": "Adam 8-bit (bitsandbytes)"}, "state_bytes", 2.0),
        ({"vp": 5}, "interleave", 5),
    ],
)
def test_what_a_word_means(changes: dict[str, Any], field: str, value: object) -> None:
    assert getattr(published_run(BLOOM | changes).run, field) == value


def test_times_from_tokens_per_second() -> None:
    row = {key: value for key, value in BLOOM.items() if key != "step_s"}
    assert published_run(row).step_s is None
    assert published_run(row | {"tokens_s_gpu": 104.0}).step_s == pytest.approx(105.0, rel=1e-2)


def test_a_wrong_file(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps(BLOOM) + "\n\n" + json.dumps({"id": "b"}) + "\n")
    with pytest.raises(UserError, match=r"runs.jsonl:3: no published run: KeyError\('set'\)"):
        read_published(file)
    with pytest.raises(UserError, match="name a file of published runs"):
        read_published(tmp_path / "absent.jsonl")
