"""Every key of DeepSpeed 0.19.8's JSON, as data.

A key has the effect that DeepSpeed documents, or says why not: `unread` and `renamed` keys are
dropped or translated with a warning, `refused` ones stop the run unless they are switched off.
`tests/config/test_drift.py` compares these tables with the installed DeepSpeed. The keys of
optimizer.params and scheduler.params are in `fgpt.optim`.
"""

from __future__ import annotations

from collections.abc import Mapping

from fgpt.optim.schedules import SCHEDULERS
from fgpt.utils.keys import Key

DTYPES = ("fp32", "bf16", "fp16")

_ANY, _STAGES_1_2, _STAGE_3 = (1, 2, 3), (1, 2), (3,)
_QUANTIZED = "quantized weights and gradients change the numbers, which FGPT has not tested on GPUs"
_REMOVED_MICS = "MiCS was removed from DeepSpeed"


def _section(keys: Mapping[str, Key] | None) -> Key:
    return Key("section", default={}, keys=keys)


def _switch(default: bool, stages: tuple[int, ...] = ()) -> Key:
    return Key("bool", default, stages=stages)


def _elements(
    default: float, stages: tuple[int, ...], low: float = 0, *, auto: bool = False
) -> Key:
    """A number of elements, which may be written as 5e8."""
    return Key("count", default, low=low, stages=stages, auto=auto)


def _unread(reason: str) -> Key:
    """A key without effect in FGPT, whatever its value."""
    return Key("section", unread=reason)


def _not_driven(reason: str) -> Key:
    """A section that DeepSpeed knows and FGPT does not use."""
    return Key("section", refused=reason)


def _removed(feature: str) -> Key:
    return Key("section", refused=f"removed from DeepSpeed, which refuses the key: {feature}")


def _old_name(path: str) -> Key:
    return Key("bool", renamed=path)


BATCH: Mapping[str, Key] = {
    name: Key("int", low=1, high=10**9, auto=True)
    for name in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    )
}

FP16: Mapping[str, Key] = {
    "enabled": Key("bool", False, auto=True),
    "auto_cast": _unread("it casts floating-point inputs, and token ids are integers"),
    "loss_scale": Key("number", 0, low=0),
    "initial_scale_power": Key("int", 16, low=0, high=32),
    "loss_scale_window": Key("int", 1000, low=1),
    "hysteresis": Key("int", 2, low=1),
    "consecutive_hysteresis": _switch(False),
    "min_loss_scale": Key("int", 1, low=0),
    "fp16_master_weights_and_grads": Key(
        "bool", False, only_default="fp16 weights lose small updates; FGPT does not test it"
    ),
}

BF16: Mapping[str, Key] = {
    "enabled": Key("bool", False, auto=True),
    "immediate_grad_update": _switch(False),
    "check_grad_overflow": _unread("FGPT always checks the gradients"),
    "bf16_master_weights_and_grads": _switch(False),
    "bf16_optimizer_states": _switch(False),
}

TORCH_AUTOCAST: Mapping[str, Key] = {
    "enabled": _switch(False),
    "dtype": Key("string", words=("bfloat16", "float16"), null=True),
    "lower_precision_safe_modules": Key("strings", null=True),
}

ACTIVATION_CHECKPOINTING: Mapping[str, Key] = {
    "partition_activations": _switch(False),
    "contiguous_memory_optimization": _switch(False),
    "cpu_checkpointing": _switch(False),
    "number_checkpoints": Key("int", low=1, null=True),
    "synchronize_checkpoint_boundary": _switch(False),
    "profile": _unread("DeepSpeed never prints these timers"),
}

DATA_TYPES: Mapping[str, Key] = {
    "grad_accum_dtype": Key("string", words=DTYPES, null=True),
    "param_dtype": Key("string", refused="it can only repeat bf16.enabled or fp16.enabled"),
    "buffer_dtype": _unread("FGPT's model sets the dtype of its tables"),
    "keep_in_fp32_modules": _unread("FGPT's model sets the dtype of its tables"),
}

_OWN_CHECKPOINTS = "FGPT reads and writes checkpoints itself (run file: checkpoint; --resume)"
CHECKPOINT: Mapping[str, Key] = {
    "tag_validation": Key("string", "Warn", words=("Ignore", "Warn", "Fail"), any_case=True),
    "load_universal": _unread(_OWN_CHECKPOINTS),
    "use_node_local_storage": _unread(_OWN_CHECKPOINTS),
    "parallel_write": _unread(_OWN_CHECKPOINTS),
    "writer": _unread(_OWN_CHECKPOINTS),
    "checkpoint_serialization": _unread(_OWN_CHECKPOINTS),
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
    "nvme_path": Key("string", null=True, device="nvme"),
    "buffer_count": Key("int", 4, low=1, device="nvme"),
    "pipeline_read": Key("bool", False, device="nvme"),
    "pipeline_write": Key("bool", False, device="nvme"),
    "fast_init": Key("bool", False, device="nvme"),
    "super_offload": Key("bool", False, only_default="it needs a CPU-GPU superchip"),
    "cpuadam_cores_perc": _unread("only super_offload reads it"),
}

OFFLOAD_PARAM: Mapping[str, Key] = {
    "device": Key("string", "none", words=("none", "cpu", "nvme")),
    "pin_memory": Key("bool", True),
    "nvme_path": Key("string", null=True, device="nvme"),
    "buffer_count": Key("int", 5, low=1, device="nvme"),
    "buffer_size": Key("count", 100_000_000, low=1, device="nvme"),
    "max_in_cpu": Key("count", 1_000_000_000, low=0, device="nvme"),
}

AIO: Mapping[str, Key] = {
    "block_size": Key("count", 1_048_576, low=1),
    "queue_depth": Key("int", 8, low=1),
    "intra_op_parallelism": Key("int", 1, low=1),
    "single_submit": _switch(False),
    "overlap_events": _switch(True),
    "use_gds": Key("bool", False, only_default="it needs NVIDIA GPUDirect Storage"),
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

_UNUSED_ZERO_KEYS: Mapping[str, Key] = {
    "allgather_partitions": _unread("DeepSpeed parses it and never reads it"),
    "compute_grad_norm": _unread("FGPT always computes the norm, which it logs and checks"),
    "load_from_fp32_weights": _unread(_OWN_CHECKPOINTS),
    "elastic_checkpoint": _unread(_OWN_CHECKPOINTS),
    "pipeline_loading_checkpoint": _unread(_OWN_CHECKPOINTS),
    "stage3_gather_16bit_weights_on_model_save": _unread(_OWN_CHECKPOINTS),
    "save_muon_momentum_buffer_in_memory": _unread(
        "FGPT's Muon keeps its momentum beside the other optimizer states"
    ),
    "leaf_module": _unread("FGPT's GPT has no mixture-of-experts modules"),
    "cpu_offload_use_pin_memory": _unread("DeepSpeed replaced it by pin_memory, and ignores it"),
    "legacy_stage1": Key("bool", refused="it was removed from DeepSpeed, which raises"),
    "zenflow": Key(
        "section", refused="it applies gradients late, so losses would differ between layouts"
    ),
    "zero_hpz_partition_size": Key("int", 1, low=1, stages=_STAGE_3),
    "zero_quantized_weights": Key("bool", refused=_QUANTIZED),
    "zero_quantized_nontrainable_weights": Key("bool", refused=_QUANTIZED),
    "zero_quantized_gradients": Key("bool", refused=_QUANTIZED),
    "mics_shard_size": Key("int", refused=_REMOVED_MICS),
    "mics_hierarchical_params_gather": Key("bool", refused=_REMOVED_MICS),
    "zeropp_loco_param": Key("section", refused="LoCo was removed from DeepSpeed"),
}

# pydantic also accepts a field by its internal name
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

_ZERO_PATH = "zero_optimization"
ZERO: Mapping[str, Key] = {
    **_SHARDING_KEYS,
    **_UNUSED_ZERO_KEYS,
    **{name: _old_name(f"{_ZERO_PATH}.stage3_{name}") for name in _INTERNAL_NAMES},
    "stage3_gather_fp16_weights_on_model_save": _old_name(
        f"{_ZERO_PATH}.stage3_gather_16bit_weights_on_model_save"
    ),
    "cpu_offload": _old_name(f"{_ZERO_PATH}.offload_optimizer"),
    "cpu_offload_param": _old_name(f"{_ZERO_PATH}.offload_param"),
}

OPTIMIZER: Mapping[str, Key] = {
    "type": Key("string"),
    "params": _section(None),
    "legacy_fusion": _unread("it belongs to the removed Apex optimizer"),
}

SCHEDULER: Mapping[str, Key] = {
    "type": Key("string", words=tuple(SCHEDULERS)),
    "params": _section(None),
}

_OTHER: Mapping[str, Key] = {
    "disable_allgather": _unread("DeepSpeed parses it and never reads it"),
    "dataloader_drop_last": _unread("FGPT has its own data loader"),
    "seq_parallel_communication_data_type": _unread("FGPT's context parallelism does not use it"),
    "use_data_before_expert_parallelism": _unread("FGPT has no experts"),
    "vocabulary_size": _unread("the run file sets it: model.vocab_size"),
    "zero_force_ds_cpu_optimizer": _unread(
        "it concerns optimizer objects; FGPT uses the JSON's optimizer"
    ),
    "managed_gradient_accumulation": Key(
        "bool", True, only_default="FGPT leaves accumulation to DeepSpeed"
    ),
    "gradient_allreduce_op": Key(
        "string",
        "mean",
        words=("mean", "sum"),
        only_default="a sum makes the step depend on the number of ranks",
    ),
    "allgather_size": Key("count", renamed=f"{_ZERO_PATH}.allgather_bucket_size"),
    "bfloat16": Key("section", renamed="bf16"),
    "autotuning": _unread("it works only with `deepspeed --autotuning` on a cluster"),
    "datastates_ckpt": _unread(_OWN_CHECKPOINTS),
    "comet": _unread("it needs a package that FGPT does not install"),
    # the wishes: fgpt.config.deepspeed.translate makes run-file fields of them
    "sequence_parallel_size": _unread("the run file sets it: parallel.cp"),
    "pipeline": _unread("the run file sets it: parallel.pp, parallel.partition"),
    "tensor_parallel": _unread("the run file sets it: parallel.tp"),
    "compile": _unread("the run file sets it: speed.compile"),
}

_NOT_DRIVEN: Mapping[str, Key] = {
    "expert_parallel": _not_driven("FGPT has no experts"),
    "hybrid_engine": _not_driven("it serves RLHF; FGPT generates with its own model"),
    "data_efficiency": _not_driven("FGPT's sampler orders the data"),
    "weight_quantization": _not_driven("it serves inference"),
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

FOREIGN: Mapping[str, str] = {
    "backend": "FGPT takes nccl on GPUs and gloo on CPUs",
    "dist_backend": "FGPT takes nccl on GPUs and gloo on CPUs",
    "distributed_backend": "FGPT takes nccl on GPUs and gloo on CPUs",
    "communication_backend": "FGPT takes nccl on GPUs and gloo on CPUs",
    "cuda_visible_devices": "it is an environment variable of the launcher",
    "CUDA_VISIBLE_DEVICES": "it is an environment variable of the launcher",
    "local_rank": "the launcher sets it",
    "num_gpus": "it is a flag of the launcher",
    "num_nodes": "it is a flag of the launcher",
}
"""Keys that users write beside DeepSpeed's, and that DeepSpeed ignores."""
SYNONYMS: Mapping[str, str] = {
    "batch_size": "train_batch_size",
    "global_batch_size": "train_batch_size",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "learning_rate": "optimizer.params.lr",
    "max_lr": "optimizer.params.lr",
    "lr": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "warmup_steps": "scheduler.params.warmup_num_steps",
    "warmup_iters": "scheduler.params.warmup_num_steps",
    "precision": "bf16.enabled or fp16.enabled",
    "mixed_precision": "bf16.enabled or fp16.enabled",
    "half": "fp16.enabled",
    "micro_batch": "train_micro_batch_size_per_gpu",
    "grad_accum": "gradient_accumulation_steps",
    "clip_grad_norm": "gradient_clipping",
    "autocast": "torch_autocast",
    "comm_dtype": "communication_data_type",
    "grad_clip": "gradient_clipping",
    "clip_grad": "gradient_clipping",
    "max_grad_norm": "gradient_clipping",
    "gradient_clipping": "gradient_clipping",
    "gradient_accumulation": "gradient_accumulation_steps",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "zero_stage": "zero_optimization.stage",
}
"""Other programs' names of what the DeepSpeed JSON states -> its key."""
COMMENTS = ("comment", "comments", "description", "note", "notes", "$schema")
"""Names of comments in JSON, beside names that begin with one of COMMENT_MARKS."""
COMMENT_MARKS = ("_", "//", "#")
IGNORES_UNKNOWN = (
    "",
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "timers",
)
"""Sections in which an unknown key may be another program's: DeepSpeed ignores it. In optimizer,
scheduler and data_types DeepSpeed ignores it too, but it was meant to have an effect."""

TOP: Mapping[str, Key] = {
    **BATCH,
    "steps_per_print": Key("count", low=1, null=True),
    "gradient_clipping": Key("number", 1.0, low=0, auto=True),
    "optimizer": _section(OPTIMIZER),
    "scheduler": _section(SCHEDULER),
    "zero_optimization": _section(ZERO),
    "zero_allow_untested_optimizer": _switch(False),
    "fp16": _section(FP16),
    "bf16": _section(BF16),
    "data_types": _section(DATA_TYPES),
    "torch_autocast": _section(TORCH_AUTOCAST),
    "communication_data_type": Key("string", words=DTYPES, null=True),
    "prescale_gradients": _switch(False),
    "gradient_predivide_factor": Key("number", 1.0, low=0, open_low=True),
    "activation_checkpointing": _section(ACTIVATION_CHECKPOINTING),
    "checkpoint": _section(CHECKPOINT),
    "aio": _section(AIO),
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
    **_OTHER,
    **_NOT_DRIVEN,
}
