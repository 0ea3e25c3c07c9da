"""Every key of DeepSpeed 0.19.8's JSON, as data.

A key is either driven (it has the effect DeepSpeed documents, through FGPT), or `refused` with the
reason, so that nothing a user writes is dropped in silence. `tests/config/test_drift.py` compares
these tables with the installed DeepSpeed. The zero_optimization keys stand in `ds_zero.py`,
optimizers and schedulers in `fgpt.optim.optimizers`.
"""

from __future__ import annotations

from collections.abc import Mapping

from fgpt.config.deepspeed.zero import ZERO
from fgpt.optim.optimizers import SCHEDULERS
from fgpt.utils.keys import Key

DTYPES = ("fp32", "bf16", "fp16")


def section(keys: Mapping[str, Key] | None) -> Key:
    return Key("section", default={}, keys=keys)


def switch(default: bool) -> Key:
    return Key("bool", default)


def not_driven(reason: str) -> Key:
    """A section that DeepSpeed knows and FGPT does not drive."""
    return Key("section", refused=reason)


def removed(what: str) -> Key:
    return Key("section", refused=f"{what} was removed from DeepSpeed, which refuses the key")


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
    "consecutive_hysteresis": switch(False),
    "min_loss_scale": Key("int", 1, low=1),
    "fp16_master_weights_and_grads": Key(
        "bool", False, only_default="weights kept in fp16 lose small updates; FGPT does not test it"
    ),
}

BF16: Mapping[str, Key] = {
    "enabled": Key("bool", False, auto=True),
    "immediate_grad_update": switch(False),
    "check_grad_overflow": Key(
        "bool", True, only_default="a non-finite gradient would reach the weights"
    ),
    "bf16_master_weights_and_grads": switch(False),
    "bf16_optimizer_states": switch(False),
}

ACTIVATION_CHECKPOINTING: Mapping[str, Key] = {
    "partition_activations": switch(False),
    "contiguous_memory_optimization": switch(False),
    "cpu_checkpointing": switch(False),
    "number_checkpoints": Key("int", low=1, null=True),
    "synchronize_checkpoint_boundary": switch(False),
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
TENSORBOARD: Mapping[str, Key] = {"enabled": switch(False), **_OUTPUT}
CSV_MONITOR: Mapping[str, Key] = {"enabled": switch(False), **_OUTPUT}
WANDB: Mapping[str, Key] = {
    "enabled": switch(False),
    "group": Key("string", null=True),
    "team": Key("string", null=True),
    "project": Key("string", "deepspeed"),
}

FLOPS_PROFILER: Mapping[str, Key] = {
    "enabled": switch(False),
    "recompute_fwd_factor": Key("number", 0.0, low=0),
    "profile_step": Key("int", 1, low=1),
    "module_depth": Key("int", -1, low=-1),
    "top_modules": Key("int", 1, low=1),
    "detailed": switch(True),
    "output_file": Key("string", null=True),
}

COMMS_LOGGER: Mapping[str, Key] = {
    "enabled": switch(False),
    "prof_all": switch(True),
    "prof_ops": Key("strings", []),
    "verbose": switch(False),
    "debug": switch(False),
}

TIMERS: Mapping[str, Key] = {
    "throughput": section({"enabled": switch(True), "synchronized": switch(True)})
}

OPTIMIZER: Mapping[str, Key] = {
    "type": Key("string"),
    "params": section(None),
    "legacy_fusion": Key("bool", False, only_default="it needs the removed Apex optimizer"),
}

SCHEDULER: Mapping[str, Key] = {
    "type": Key("string", words=tuple(SCHEDULERS)),
    "params": section(None),
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
    "pipeline": not_driven(
        "it is said in the run file, parallel.pp and parallel.partition, and in"
        " activation_checkpointing"
    ),
    "torch_autocast": not_driven("FGPT's precision is bf16.enabled or fp16.enabled"),
    "tensor_parallel": not_driven(
        "AutoTP rewrites Hugging Face models; it is said in the run file: parallel.tp"
    ),
    "expert_parallel": not_driven("FGPT has no experts"),
    "compile": not_driven("FGPT does not call engine.compile()"),
    "autotuning": not_driven("it works through `deepspeed --autotuning` on a cluster only"),
    "hybrid_engine": not_driven("it serves RLHF; FGPT generates with its own model"),
    "data_efficiency": not_driven("FGPT's sampler orders the data"),
    "weight_quantization": not_driven("it serves inference"),
    "datastates_ckpt": not_driven("it needs a package FGPT does not install"),
    "comet": not_driven("it needs a package FGPT does not install"),
    "elasticity": removed("elastic training"),
    "nebula": removed("Nebula checkpointing"),
    "compression_training": removed("the compression library"),
    "amp": removed("NVIDIA Apex AMP"),
    "quantize_training": removed("mixture-of-quantization"),
    "sparse_gradients": removed("sparse embedding gradients"),
    "eigenvalue": removed("mixture-of-quantization"),
    "sparse_attention": removed("sparse attention"),
    "graph_harvesting": removed("graph harvesting"),
    "curriculum_learning": removed("the old curriculum"),
    "progressive_layer_drop": removed("progressive layer dropping"),
}

TOP: Mapping[str, Key] = {
    **BATCH,
    "steps_per_print": Key("int", low=1, null=True),
    "gradient_clipping": Key("number", 1.0, low=0, auto=True),
    "optimizer": section(OPTIMIZER),
    "scheduler": section(SCHEDULER),
    "zero_optimization": section(ZERO),
    "zero_allow_untested_optimizer": switch(False),
    "fp16": section(FP16),
    "bf16": section(BF16),
    "data_types": section(DATA_TYPES),
    "communication_data_type": Key("string", words=DTYPES, null=True),
    "prescale_gradients": switch(False),
    "gradient_predivide_factor": Key("number", 1.0, low=0, open_low=True),
    "activation_checkpointing": section(ACTIVATION_CHECKPOINTING),
    "checkpoint": section(CHECKPOINT),
    "aio": not_driven("NVMe offload is not supported yet"),
    "tensorboard": section(TENSORBOARD),
    "wandb": section(WANDB),
    "csv_monitor": section(CSV_MONITOR),
    "flops_profiler": section(FLOPS_PROFILER),
    "comms_logger": section(COMMS_LOGGER),
    "timers": section(TIMERS),
    "wall_clock_breakdown": switch(False),
    "memory_breakdown": switch(False),
    "dump_state": switch(False),
    "disable_python_gc": switch(False),
    "log_level": Key("string", words=("debug", "info", "warning", "error", "critical"), null=True),
    **_UNUSED,
    **_NOT_DRIVEN,
}
