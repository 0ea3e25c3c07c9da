"""Runs that others published, as planned runs: what the planner is judged by.

A file of them has one JSON object a line; its keys are those of `PublishedRun` and what `_model`
and `_layout` read. What a row does not say is filled in from what its framework does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.config.schema import ModelConfig
from fgpt.errors import UserError
from fgpt.plan.cluster import Cluster, find_device
from fgpt.plan.planned_run import Engine, PlannedPrecision, PlannedRun, Recompute

UNFUSED_FRAMEWORKS = ("Megatron-LM", "Megatron-DeepSpeed", "Megatron + DeepSpeed")
"""Their runs before 2023 had no attention kernel without materialized scores."""
TEST_CASES = "Megatron-Core (CI)"
"""The framework of the values that Megatron-LM's repository has of its tests."""


REDUCES_16_BITS = ("InternEvo", "NeMo", "fms-fsdp")
"""They reduce gradients in bf16 where others that train in bf16 reduce in fp32."""
NVLINK_DOMAIN = 72
"""Devices of a GB200 NVL72."""


@dataclass(frozen=True)
class PublishedRun:
    """A run with what was measured of it; None: not published."""

    id: str
    set: str
    quality: str
    """A: complete; B: something was inferred; C: noisy."""
    run: PlannedRun
    cluster: Cluster
    micro_is_published: bool
    step_s: float | None
    memory_gib: float | None
    """Peak of one rank's torch allocations (`memory_kind`)."""
    memory_gb: float | None
    """As nvidia-smi shows it, with the CUDA context and what the allocator keeps."""
    memory_kind: str
    is_out_of_memory: bool


def read_published(file: Path) -> list[PublishedRun]:
    """Return the runs of a file. Raises UserError that names the line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}; name a file of published runs") from error
    runs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            runs.append(published_run(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}:{number}: no published run: {error!r}") from error
    return runs


def published_run(row: Mapping[str, Any]) -> PublishedRun:
    """Return the run of one row; KeyError, TypeError or ValueError where it is incomplete."""
    return PublishedRun(
        id=row["id"],
        set=row["set"],
        # reinforcement learning: most of the memory is that of generation, its key/value cache
        quality="C" if "_grpo_" in row["id"] else row["quality"],
        run=_layout(row, _model(row)),
        cluster=_cluster(row),
        micro_is_published="micro_batch" in row,
        step_s=_step_s(row),
        memory_gib=row.get("memory_gib"),
        memory_gb=row.get("memory_gb"),
        memory_kind=row.get("memory_kind", ""),
        is_out_of_memory=bool(row.get("oom")),
    )


def _model(row: Mapping[str, Any]) -> ModelConfig:
    n_head = row.get("n_head") or _n_head(row["d_model"])
    position = str(row["position"])
    is_unfused = _is_unfused(row)
    return ModelConfig(
        preset=row["model"],
        vocab_size=_padded_vocab(row),
        max_seq_len=row["seq_len"],
        n_layer=row["n_layer"],
        d_model=row["d_model"],
        n_head=n_head,
        n_kv_head=row.get("n_kv_head") or n_head,
        d_head=row.get("d_head") or row["d_model"] // n_head,
        d_ff=row["d_ff"],
        activation=_word(
            row["activation"],
            {"swiglu": "swiglu", "relu2": "relu2", "squared": "relu2", "relu": "relu"},
            "gelu",
        ),
        norm="rmsnorm" if "rms" in row["norm"] else "layernorm",
        position="rotary" if position.startswith(("rope", "rotary")) else "learned",
        tied_head=bool(row["tied_head"]),
        bias="rms" not in row["norm"],
        dropout=0.1 if is_unfused or _has_default_dropout(row) else 0.0,
        attention="reference" if is_unfused else "sdpa",
    )


def _has_default_dropout(row: Mapping[str, Any]) -> bool:
    """Whether a run of Megatron-LM's own test cases leaves dropout at its default, 0.1. Those that
    choose flash attention set 0, and so do those in fp8.
    """
    is_default = row.get("attention") == "transformer engine default"
    return is_default and row["framework"] == TEST_CASES and "fp8" not in row["source"]


def _padded_vocab(row: Mapping[str, Any]) -> int:
    """Megatron pads the vocabulary to a multiple of 128 on each tensor-parallel rank."""
    if not str(row["framework"]).startswith(("Megatron", "NeMo")):
        return int(row["vocab"])
    multiple = 128 * row["tp"]
    return int(-(-row["vocab"] // multiple) * multiple)


def _n_head(d_model: int) -> int:
    """Heads where they are not published: of at least 128 elements, as in most large models, and
    in a number that 8 tensor-parallel ranks divide.
    """
    fits = (n for n in range(d_model // 128, 0, -1) if d_model % n == 0 and n % 8 == 0)
    return next(fits, max(d_model // 128, 1))


def _is_unfused(row: Mapping[str, Any]) -> bool:
    attention = row.get("attention")
    if attention is None:
        return str(row["framework"]).startswith(UNFUSED_FRAMEWORKS)
    # its test cases without "te" in their names have `--transformer-impl: local`
    is_local = row["framework"] == TEST_CASES and "/gpt3_mcore_tp" in row["source"]
    return is_local or str(attention).startswith("unfused")


def _layout(row: Mapping[str, Any], model: ModelConfig) -> PlannedRun:
    framework, sharding = str(row["framework"]), str(row.get("sharding", ""))
    engine: Engine = "megatron"
    is_internevo = framework.startswith("InternEvo")
    if "FSDP" in sharding and not is_internevo:
        # InternEvo's shards have 16 bits; its own optimizer has fp32 copies, as ZeRO-3 has
        engine = "fsdp"
    elif "DeepSpeed" in framework and "zero" in row:
        engine = "deepspeed"
    elif not _is_megatron(framework) and row.get("zero"):
        engine = "deepspeed"
    checkpointing = str(row["activation_checkpointing"])
    recompute, share = _recompute(checkpointing)
    micro = row.get("micro_batch") or 1
    accumulation = row.get("accum") or max(row["global_batch"] // (row["dp"] * micro), 1)
    precision = _word(row["precision"], {"fp8": "fp8", "bf16": "bf16", "fp16": "fp16"}, "fp32")
    gradient_bytes, reduced_bytes = _gradient_sizes(row, precision)
    return PlannedRun(
        model=model,
        seq_len=row["seq_len"],
        micro=micro,
        accumulation=accumulation,
        precision=precision,
        engine=engine,
        tp=row["tp"],
        pp=row["pp"],
        cp=row["cp"],
        dp=row["dp"],
        zero_stage=row.get("zero") or 0,
        shards=_shards(row),
        interleave=row.get("vp") or 1,
        sequence=bool(row.get("sequence_parallel")),
        recompute=recompute,
        recomputed_share=share,
        gradient_bytes=gradient_bytes,
        reduced_bytes=reduced_bytes,
        state_bytes=2.0 if "8-bit" in str(row.get("optimizer")) else 8.0,
        partition=_partition(row),
        offloads_optimizer="optimizer" in str(row.get("offload", "")),
        offloads_params="parameters" in str(row.get("offload", "")),
        is_compiled=bool(row.get("compile")),
        fused_optimizer=not is_internevo,
        # flash-attention's cross entropy
        loss="in_place" if framework.startswith(("InternEvo", "llm-foundry")) else "plain",
        kernels="megatron" if _is_megatron(framework) else "fgpt",
    )


def _gradient_sizes(row: Mapping[str, Any], precision: PlannedPrecision) -> tuple[int, int]:
    """Bytes of an element where gradients are summed, and where they are sent."""
    framework = str(row["framework"])
    is_nemo = framework.startswith("NeMo")  # its recipes: `grad_reduce_in_fp32` False
    is_16 = precision == "fp16" and not row.get("grad_dtype")
    sums_16 = is_16 or is_nemo or framework.startswith("InternEvo")
    sends_16 = sums_16 or precision == "fp16" or "PURE" in row["precision"]
    sends_16 = sends_16 or framework.startswith(REDUCES_16_BITS)
    return 2 if sums_16 else 4, 2 if sends_16 else 4


def _is_megatron(framework: str) -> bool:
    return framework.startswith(("Megatron", "NeMo", "NVIDIA"))


def _recompute(text: str) -> tuple[Recompute, float]:
    if text.startswith("full"):
        return "full", 1.0
    if "2nd layer" in text or "some blocks" in text:
        return "full", 0.5
    if "(op)" in text:
        return "cheap", 1.0
    return ("attention", 1.0) if text.startswith("selective") else ("none", 1.0)


def _shards(row: Mapping[str, Any]) -> int | None:
    sharding = str(row.get("sharding", ""))
    found = re.search(r"over (\d+) ranks", sharding)
    if found:
        return min(int(found[1]), row["dp"])
    return int(min(row["gpus_per_node"], row["dp"])) if "hybrid" in sharding else None


def _partition(row: Mapping[str, Any]) -> str:
    """Value of `parallel.partition`. DeepSpeed of 2021 filled stage after stage, so that the last
    one got what was left.
    """
    if "each count as a layer" in str(row.get("pp_partition", "")):
        return "uniform"
    n_layer, pp = row["n_layer"], row["pp"]
    full, rest = divmod(n_layer, -(-n_layer // pp))
    if "DeepSpeed" in str(row["framework"]) and rest and full == pp - 1:
        return ",".join([str(n_layer // pp + 1)] * full + [str(rest)])
    return "type:block"


def _word(text: str, words: Mapping[str, Any], default: Any) -> Any:
    return next((word for part, word in words.items() if part in text), default)


def _cluster(row: Mapping[str, Any]) -> Cluster:
    name, size = row["gpu"], row.get("gpu_mem_gb")
    kinds = ("GB200", "B200", "H200", "H100", "A800", "A100", "V100")
    kind = next((kind for kind in kinds if kind in name), None)
    if kind is None:
        raise ValueError(f"gpu {name!r} is not known")
    sizes = {"A100": size or 80, "V100": size or 32, "GB200": 186, "H200": 141, "B200": 180}
    device = find_device(f"{kind.lower()}-{sizes.get(kind, 80)}g")
    network = _network(row, device.network_gbit_s)
    if "72 domain" in str(row.get("interconnect", "")):  # NVLink reaches all: one large node
        network *= NVLINK_DOMAIN / row["gpus_per_node"]
        return Cluster(device, row["gpus"], NVLINK_DOMAIN, network)
    return Cluster(device, row["gpus"], row["gpus_per_node"], network)


def _network(row: Mapping[str, Any], default: float) -> float:
    """Gbit/s of a node, from the words about it."""
    text = str(row.get("interconnect", ""))
    found = re.search(r"(?:(\d+)\s*[x×]\s*)?(\d+) Gb/s", text)
    if found is None:
        # Jean Zay: 4 links of Omni-Path, of 100 Gb/s each
        return 400.0 if "Omni-Path" in text else default
    total = float(found[1] or 1) * float(found[2])
    return total * row["gpus_per_node"] if "a GPU" in text else total


def _step_s(row: Mapping[str, Any]) -> float | None:
    for key in ("step_s", "derived_step_s"):
        if key in row:
            return float(row[key])
    if "tokens_s_gpu" in row:
        return float(row["global_batch"] * row["seq_len"] / (row["tokens_s_gpu"] * row["gpus"]))
    return None
