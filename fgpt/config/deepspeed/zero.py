"""The keys of DeepSpeed 0.19.8's `zero_optimization`, as data: which stages read which key."""

from __future__ import annotations

from collections.abc import Mapping

from fgpt.utils.keys import Key

_ANY = (1, 2, 3)
_FLAT = (1, 2)
_FULL = (3,)

_NVME = "it concerns NVMe offload, which is not supported yet"
_ZEROPP = "ZeRO++ needs several GPU nodes to mean anything; FGPT does not test it"


def _flag(default: bool, stages: tuple[int, ...]) -> Key:
    return Key("bool", default, stages=stages)


def _elements(
    default: float, stages: tuple[int, ...], low: float = 0, *, auto: bool = False
) -> Key:
    """A number of elements; 5e8 is as good as 500000000."""
    return Key("count", default, low=low, stages=stages, auto=auto)


def _old(name: str) -> Key:
    return Key("bool", refused="an old or inner name of a key", instead=f"zero_optimization.{name}")


OFFLOAD_OPTIMIZER: Mapping[str, Key] = {
    "device": Key("string", "none", words=("none", "cpu", "nvme")),
    "pin_memory": Key("bool", True),
    "ratio": Key("number", 1.0, low=0, high=1),
    "nvme_path": Key("string", refused=_NVME),
    "buffer_count": Key("int", refused=_NVME),
    "pipeline_read": Key("bool", False, only_default=_NVME),
    "pipeline_write": Key("bool", False, only_default=_NVME),
    "fast_init": Key("bool", False, only_default=_NVME),
    "super_offload": Key("bool", False, only_default="it needs a CPU-GPU superchip"),
    "cpuadam_cores_perc": Key("number", refused="it is read by super_offload only"),
}

OFFLOAD_PARAM: Mapping[str, Key] = {
    "device": Key("string", "none", words=("none", "cpu", "nvme")),
    "pin_memory": Key("bool", True),
    "nvme_path": Key("string", refused=_NVME),
    "buffer_count": Key("int", refused=_NVME),
    "buffer_size": Key("count", refused=_NVME),
    "max_in_cpu": Key("count", refused=_NVME),
}

_SHARDING: Mapping[str, Key] = {
    "stage": Key("int", 0, low=0, high=3),
    "contiguous_gradients": _flag(True, _ANY),
    "reduce_scatter": _flag(True, _ANY),
    "reduce_bucket_size": _elements(5e8, _ANY, low=1, auto=True),
    "overlap_comm": Key("bool", stages=_ANY, null=True),
    "offload_optimizer": Key("section", {}, keys=OFFLOAD_OPTIMIZER, null=True),
    "offload_param": Key("section", {}, keys=OFFLOAD_PARAM, null=True),
    "use_multi_rank_bucket_allreduce": _flag(True, _FLAT),
    "allgather_bucket_size": _elements(5e8, _FLAT, low=2),
    "round_robin_gradients": _flag(False, _FLAT),
    "parameter_alignment": _flag(False, _FLAT),
    "ignore_unused_parameters": _flag(True, _FLAT),
    "sub_group_size": _elements(1e9, _FULL, low=1),
    "stage3_prefetch_bucket_size": _elements(5e7, _FULL, auto=True),
    "stage3_param_persistence_threshold": _elements(1e5, _FULL, auto=True),
    "stage3_model_persistence_threshold": _elements(9223372036854775807, _FULL),
    "stage3_max_live_parameters": _elements(1e9, _FULL),
    "stage3_max_reuse_distance": _elements(1e9, _FULL),
    "stage3_module_granularity_threshold": _elements(0, _FULL),
    "stage3_use_all_reduce_for_fetch_params": _flag(False, _FULL),
    "stage3_allgather_sequential": _flag(False, _FULL),
    "memory_efficient_linear": _flag(True, _FULL),
    "override_module_apply": _flag(True, _FULL),
    "log_trace_cache_warnings": _flag(False, _FULL),
    "enable_sanity_checks": _flag(False, _FULL),
}

_REFUSED: Mapping[str, Key] = {
    "allgather_partitions": Key(
        "bool", True, only_default="DeepSpeed parses it and never reads it"
    ),
    "compute_grad_norm": Key(
        "bool", True, only_default="FGPT logs the norm and stops on a non-finite one"
    ),
    "load_from_fp32_weights": Key(
        "bool", True, only_default="a resume from rounded weights is not the run that stopped"
    ),
    "elastic_checkpoint": Key("bool", False, only_default="an old checkpoint format"),
    "legacy_stage1": Key("bool", False, only_default="removed; DeepSpeed raises"),
    "pipeline_loading_checkpoint": Key(
        "bool", False, only_default="FGPT loads its checkpoints on all ranks at once"
    ),
    "stage3_gather_16bit_weights_on_model_save": Key(
        "bool", False, auto=True, only_default="FGPT gathers and writes whole weights itself"
    ),
    "zenflow": Key("section", refused="it applies gradients late; losses differ between layouts"),
    "leaf_module": Key("section", refused="FGPT's GPT has no mixture-of-experts modules"),
    "save_muon_momentum_buffer_in_memory": Key("bool", False, only_default=_NVME),
    "zero_hpz_partition_size": Key("int", refused=_ZEROPP),
    "zero_quantized_weights": Key("bool", False, only_default=_ZEROPP),
    "zero_quantized_nontrainable_weights": Key("bool", False, only_default=_ZEROPP),
    "zero_quantized_gradients": Key("bool", False, only_default=_ZEROPP),
    "mics_shard_size": Key("int", refused="MiCS was removed from DeepSpeed"),
    "mics_hierarchical_params_gather": Key("bool", refused="MiCS was removed from DeepSpeed"),
    "zeropp_loco_param": Key("section", refused="LoCo was removed from DeepSpeed"),
}

# pydantic also takes a field by its inner name; one name per key is enough.
_INNER = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)

ZERO: Mapping[str, Key] = {
    **_SHARDING,
    **_REFUSED,
    **{name: _old(f"stage3_{name}") for name in _INNER},
    "stage3_gather_fp16_weights_on_model_save": _old("stage3_gather_16bit_weights_on_model_save"),
    "cpu_offload": _old("offload_optimizer"),
    "cpu_offload_param": _old("offload_param"),
    "cpu_offload_use_pin_memory": _old("offload_optimizer.pin_memory"),
}
