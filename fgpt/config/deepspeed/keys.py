"""Every key of DeepSpeed 0.19.8's JSON, as data.

A key either has the effect that DeepSpeed documents, or it is `refused` with the reason, so that
FGPT silently drops nothing that a user writes. `tests/config/test_drift.py` compares these tables
with the installed DeepSpeed. The keys of optimizer.params and scheduler.params are in `fgpt.optim`.
"""

from __future__ import annotations

from collections.abc import Mapping

from fgpt.optim.schedules import SCHEDULERS
from fgpt.utils.keys import Key

DTYPES = ("fp32", "bf16", "fp16")

_ANY, _STAGES_1_2, _STAGE_3 = (1, 2, 3), (1, 2), (3,)
_NVME = "it concerns NVMe offload, which FGPT does not support yet"
_ZEROPP = "ZeRO++ needs several GPU nodes, on which FGPT has not tested it"


def _section(keys: Mapping[str, Key] | None) -> Key:
    return Key("section", default={}, keys=keys)


def _switch(default: bool, stages: tuple[int, ...] = ()) -> Key:
    return Key("bool", default, stages=stages)


def _elements(
    default: float, stages: tuple[int, ...], low: float = 0, *, auto: bool = False
) -> Key:
    """A number of elements, which may be written as 5e8."""
    return Key("count", default, low=low, stages=stages, auto=auto)


def _not_driven(reason: str) -> Key:
    """A section that DeepSpeed knows and FGPT does not use."""
    return Key("section", refused=reason)


def _removed(feature: str) -> Key:
    return Key("section", refused=f"{feature} was removed from DeepSpeed, which refuses the key")


def _old_name(name: str) -> Key:
    return Key(
        "bool", refused="an old or internal name of a key", instead=f"zero_optimization.{name}"
    )


BATCH: Mapping[str, Key] = {
    name: Key("int", low=1, auto=True)
    for name in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    )
}

FP16: Mapping[str, Key] = {
    "enabled": Key("bool", False, auto=True),
    "auto_cast": Key("bool", False, only_default="it casts the inputs; token ids stay integers"),
    "loss_scale": Key("number", 0, low=0),
    "initial_scale_power": Key("int", 16, low=0, high=32),
    "loss_scale_window": Key("int", 1000, low=1),
    "hysteresis": Key("int", 2, low=1),
    "consecutive_hysteresis": _switch(False),
    "min_loss_scale": Key("int", 1, low=1),
    "fp16_master_weights_and_grads": Key(
        "bool", False, only_default="weights kept in fp16 lose small updates; FGPT does not test it"
    ),
}

BF16: Mapping[str, Key] = {
    "enabled": Key("bool", False, auto=True),
    "immediate_grad_update": _switch(False),
    "check_grad_overflow": Key(
        "bool", True, only_default="a non-finite gradient would reach the weights"
    ),
    "bf16_master_weights_and_grads": _switch(False),
    "bf16_optimizer_states": _switch(False),
}

ACTIVATION_CHECKPOINTING: Mapping[str, Key] = {
    "partition_activations": _switch(False),
    "contiguous_memory_optimization": _switch(False),
    "cpu_checkpointing": _switch(False),
    "number_checkpoints": Key("int", low=1, null=True),
    "synchronize_checkpoint_boundary": _switch(False),
    "profile": Key("bool", False, only_default="DeepSpeed never prints these timers"),
}

DATA_TYPES: Mapping[str, Key] = {
    "grad_accum_dtype": Key("string", words=DTYPES, null=True),
    "param_dtype": Key(
        "string", refused="it may only repeat what bf16.enabled or fp16.enabled says"
    ),
    "buffer_dtype": Key("string", refused="FGPT's model chooses the dtype of its own tables"),
    "keep_in_fp32_modules": Key(
        "strings", refused="FGPT's model chooses the dtype of its own tables"
    ),
}

_SHARED_DIR = "FGPT's checkpoints are one directory that all ranks see"
CHECKPOINT: Mapping[str, Key] = {
    "tag_validation": Key("string", "Warn", words=("Ignore", "Warn", "Fail"), any_case=True),
    "load_universal": Key("bool", False, only_default="--resume decides how a checkpoint is read"),
    "use_node_local_storage": Key("bool", False, only_default=_SHARED_DIR),
    "parallel_write": Key(
        "section", refused="one rank writes a pipeline stage's layers; FGPT does not test more"
    ),
    "writer": Key("section", refused="FGPT hashes and commits what torch.save wrote"),
    "checkpoint_serialization": Key("bool", True, only_default="it is read by `writer` only"),
}

_OUTPUT = {"output_path": Key("string", ""), "job_name": Key("string", "DeepSpeedJobName")}
TENSORBOARD: Mapping[str, Key] = {"enabled": _switch(False), **_OUTPUT}
CSV_MONITOR: Mapping[str, Key] = {"enabled": _switch(False), **_OUTPUT}
WANDB: Mapping[str, Key] = {
    "enabled": _switch(False),
    "group": Key("string", null=True),
    "team": Key("string", null=True),
    "project": Key("string", "deepspeed"),
}

FLOPS_PROFILER: Mapping[str, Key] = {
    "enabled": _switch(False),
    "recompute_fwd_factor": Key("number", 0.0, low=0),
    "profile_step": Key("int", 1, low=1),
    "module_depth": Key("int", -1, low=-1),
    "top_modules": Key("int", 1, low=1),
    "detailed": _switch(True),
    "output_file": Key("string", null=True),
}

COMMS_LOGGER: Mapping[str, Key] = {
    "enabled": _switch(False),
    "prof_all": _switch(True),
    "prof_ops": Key("strings", []),
    "verbose": _switch(False),
    "debug": _switch(False),
}

TIMERS: Mapping[str, Key] = {
    "throughput": _section({"enabled": _switch(True), "synchronized": _switch(True)})
}

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

_SHARDING_KEYS: Mapping[str, Key] = {
    "stage": Key("int", 0, low=0, high=3),
    "contiguous_gradients": _switch(True, _ANY),
    "reduce_scatter": _switch(True, _ANY),
    "reduce_bucket_size": _elements(5e8, _ANY, low=1, auto=True),
    "overlap_comm": Key("bool", stages=_ANY, null=True),
    "offload_optimizer": Key("section", {}, keys=OFFLOAD_OPTIMIZER, null=True),
    "offload_param": Key("section", {}, keys=OFFLOAD_PARAM, null=True),
    "use_multi_rank_bucket_allreduce": _switch(True, _STAGES_1_2),
    "allgather_bucket_size": _elements(5e8, _STAGES_1_2, low=2),
    "round_robin_gradients": _switch(False, _STAGES_1_2),
    "parameter_alignment": _switch(False, _STAGES_1_2),
    "ignore_unused_parameters": _switch(True, _STAGES_1_2),
    "sub_group_size": _elements(1e9, _STAGE_3, low=1),
    "stage3_prefetch_bucket_size": _elements(5e7, _STAGE_3, auto=True),
    "stage3_param_persistence_threshold": _elements(1e5, _STAGE_3, auto=True),
    "stage3_model_persistence_threshold": _elements(9223372036854775807, _STAGE_3),
    "stage3_max_live_parameters": _elements(1e9, _STAGE_3),
    "stage3_max_reuse_distance": _elements(1e9, _STAGE_3),
    "stage3_module_granularity_threshold": _elements(0, _STAGE_3),
    "stage3_use_all_reduce_for_fetch_params": _switch(False, _STAGE_3),
    "stage3_allgather_sequential": _switch(False, _STAGE_3),
    "memory_efficient_linear": _switch(True, _STAGE_3),
    "override_module_apply": _switch(True, _STAGE_3),
    "log_trace_cache_warnings": _switch(False, _STAGE_3),
    "enable_sanity_checks": _switch(False, _STAGE_3),
}

_REFUSED_ZERO_KEYS: Mapping[str, Key] = {
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

# pydantic also accepts a field by its internal name; FGPT accepts one name per key
_INTERNAL_NAMES = (
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
    **_SHARDING_KEYS,
    **_REFUSED_ZERO_KEYS,
    **{name: _old_name(f"stage3_{name}") for name in _INTERNAL_NAMES},
    "stage3_gather_fp16_weights_on_model_save": _old_name(
        "stage3_gather_16bit_weights_on_model_save"
    ),
    "cpu_offload": _old_name("offload_optimizer"),
    "cpu_offload_param": _old_name("offload_param"),
    "cpu_offload_use_pin_memory": _old_name("offload_optimizer.pin_memory"),
}

OPTIMIZER: Mapping[str, Key] = {
    "type": Key("string"),
    "params": _section(None),
    "legacy_fusion": Key("bool", False, only_default="it needs the removed Apex optimizer"),
}

SCHEDULER: Mapping[str, Key] = {
    "type": Key("string", words=tuple(SCHEDULERS)),
    "params": _section(None),
}

_UNUSED: Mapping[str, Key] = {
    "disable_allgather": Key("bool", False, only_default="DeepSpeed parses it and never reads it"),
    "dataloader_drop_last": Key("bool", False, only_default="FGPT's own loader drops the rest"),
    "seq_parallel_communication_data_type": Key(
        "string", refused="it belongs to sequence_parallel_size, which FGPT does not use"
    ),
    "sequence_parallel_size": Key("int", refused="it is said in the run file: parallel.cp"),
    "use_data_before_expert_parallelism": Key("bool", refused="FGPT has no experts"),
    "vocabulary_size": Key("int", refused="it is said in the run file: model.vocab_size"),
    "zero_force_ds_cpu_optimizer": Key(
        "bool", True, only_default="it concerns optimizers passed as objects; FGPT's is the JSON's"
    ),
    "managed_gradient_accumulation": Key(
        "bool", True, only_default="FGPT leaves the accumulation boundaries to DeepSpeed"
    ),
    "gradient_allreduce_op": Key(
        "string",
        "mean",
        words=("mean", "sum"),
        only_default="a sum makes the step depend on the number of ranks",
    ),
    "allgather_size": Key(
        "count",
        refused="an old name",
        instead="zero_optimization.allgather_bucket_size",
    ),
    "bfloat16": Key("section", refused="an old name", instead="bf16"),
}

_NOT_DRIVEN: Mapping[str, Key] = {
    "pipeline": _not_driven(
        "it is said in the run file, parallel.pp and parallel.partition, and in"
        " activation_checkpointing"
    ),
    "torch_autocast": _not_driven("FGPT's precision is bf16.enabled or fp16.enabled"),
    "tensor_parallel": _not_driven(
        "AutoTP rewrites Hugging Face models; it is said in the run file: parallel.tp"
    ),
    "expert_parallel": _not_driven("FGPT has no experts"),
    "compile": _not_driven("FGPT does not call engine.compile()"),
    "autotuning": _not_driven("it works through `deepspeed --autotuning` on a cluster only"),
    "hybrid_engine": _not_driven("it serves RLHF; FGPT generates with its own model"),
    "data_efficiency": _not_driven("FGPT's sampler orders the data"),
    "weight_quantization": _not_driven("it serves inference"),
    "datastates_ckpt": _not_driven("it needs a package FGPT does not install"),
    "comet": _not_driven("it needs a package FGPT does not install"),
    "elasticity": _removed("elastic training"),
    "nebula": _removed("Nebula checkpointing"),
    "compression_training": _removed("the compression library"),
    "amp": _removed("NVIDIA Apex AMP"),
    "quantize_training": _removed("mixture-of-quantization"),
    "sparse_gradients": _removed("sparse embedding gradients"),
    "eigenvalue": _removed("mixture-of-quantization"),
    "sparse_attention": _removed("sparse attention"),
    "graph_harvesting": _removed("graph harvesting"),
    "curriculum_learning": _removed("the old curriculum"),
    "progressive_layer_drop": _removed("progressive layer dropping"),
}

TOP: Mapping[str, Key] = {
    **BATCH,
    "steps_per_print": Key("int", low=1, null=True),
    "gradient_clipping": Key("number", 1.0, low=0, auto=True),
    "optimizer": _section(OPTIMIZER),
    "scheduler": _section(SCHEDULER),
    "zero_optimization": _section(ZERO),
    "zero_allow_untested_optimizer": _switch(False),
    "fp16": _section(FP16),
    "bf16": _section(BF16),
    "data_types": _section(DATA_TYPES),
    "communication_data_type": Key("string", words=DTYPES, null=True),
    "prescale_gradients": _switch(False),
    "gradient_predivide_factor": Key("number", 1.0, low=0, open_low=True),
    "activation_checkpointing": _section(ACTIVATION_CHECKPOINTING),
    "checkpoint": _section(CHECKPOINT),
    "aio": _not_driven("NVMe offload is not supported yet"),
    "tensorboard": _section(TENSORBOARD),
    "wandb": _section(WANDB),
    "csv_monitor": _section(CSV_MONITOR),
    "flops_profiler": _section(FLOPS_PROFILER),
    "comms_logger": _section(COMMS_LOGGER),
    "timers": _section(TIMERS),
    "wall_clock_breakdown": _switch(False),
    "memory_breakdown": _switch(False),
    "dump_state": _switch(False),
    "disable_python_gc": _switch(False),
    "log_level": Key("string", words=("debug", "info", "warning", "error", "critical"), null=True),
    **_UNUSED,
    **_NOT_DRIVEN,
}
