"""Every private name of DeepSpeed and torch that FGPT reads or replaces, each with its reason.

`tests/engine/test_patches.py` checks that the installed versions still have them, and that no file
of the package but `fgpt.engine.deepspeed.patches` uses one of DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class PrivateName(NamedTuple):
    """A name that an upgrade of DeepSpeed or torch may remove without notice."""

    owner: str
    """Import path of a module, class or function."""
    name: str
    """Attribute of `owner` or of its instances, or a text in its source."""
    why: str
    """What upstream does with it -> what FGPT does with it."""


def _read_table(text: str) -> Iterator[PrivateName]:
    """Parse an owner's line, then indented lines `names: reason`, or names for SyncFreeZeroStep."""
    owner = ""
    for line in text.strip().splitlines():
        names, _, why = line.strip().partition(": ")
        if line[0] != " ":
            owner = names
        else:
            why = why or "part of upstream's step -> repeated by SyncFreeZeroStep"
            yield from (PrivateName(owner, name, why) for name in names.split(", "))


PRIVATE: tuple[PrivateName, ...] = tuple(
    _read_table("""
deepspeed.runtime.engine.DeepSpeedEngine
    _take_model_step: clips, steps, counts skips, moves the schedule -> wrapped by OptimizerStep
    skipped_steps, global_steps, global_samples: counters -> read, set by a resume
    micro_steps: steps at multiples of the accumulation -> reset when a batch ramp changes it
    tput_timer: has a copy of the batch size -> the same
    monitor: opens at once, x axis in samples -> Monitors
    flops_profiler: misses replaced products -> StepFlopsProfiler
    engine_timers: count evaluations to the next step -> reset after one
    basic_optimizer: torch's, inside -> its steps get muP's learning rates
    was_step_applied: False after a skipped step -> read where upstream's step stays
deepspeed.monitor.monitor.MonitorMaster
    csv_monitor, tb_monitor: the monitors that are on -> continued after a resume
deepspeed.monitor.csv_monitor.csvMonitor
    filenames: files that have their header, log_dir: their directory -> cut, no second header
deepspeed.monitor.tensorboard.TensorBoardMonitor
    summary_writer: hides nothing after a resume -> one with purge_step
deepspeed.profiling.flops_profiler.profiler.FlopsProfiler
    started, ds_engine, print_model_profile, end_profile, reset_profile: see StepFlopsProfiler
deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer
    step: waits for norm and overflow -> replaced by SyncFreeZeroStep
    get_grad_norm_direct: one kernel per tensor, float32 sums -> replaced by grad_norm
    has_overflow: isfinite of each gradient -> skipped, the norm shows the same
    reduce_independent_p_g_buckets_and_remove_grads: fills buckets -> bypassed on one replica
    reduce_ipg_grads, setup_buckets: reduces and allocates them -> bypassed on one replica
    _global_grad_norm: value of get_global_grad_norm() -> set by SyncFreeZeroStep
    _lazy_init_hp_params_optimizer_state: links states to parameters -> called after a step
    _zero_padding: marks padding of a partition -> left out of the norm
    overflow: skip flag, saved in checkpoints -> reset
    cpu_offload, compute_grad_norm, check_grad_overflow: options -> decide what can be replaced
    partition_gradients, use_grad_accum_attribute: ZeRO-2, float32 sums -> the same
    _get_preflattened_grad_partition, _release_preflattened_grad_buffers
    _model_parallel_all_reduce, micro_step_id, single_partition_of_fp32_groups, bit16_groups
    bit16_groups_flat, parallel_partitioned_bit16_groups, averaged_gradients, all_grad_tensors
    round_robin_bit16_groups, round_robin_bit16_offsets: order of the parameters -> saved and loaded
    round_robin_gradients, round_robin_bit16_padding, _link_all_hp_params: links -> mended
    params_in_partition, partition_size, free_grad_in_param_list, flatten, clip_grad
    flatten_dense_tensors_aligned, dp_process_group, real_dp_process_group, model_parallel_group
    model_parallel_rank, nccl_start_alignment_factor, allgather_bucket_size
deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3
    _swappable_optimizer_subgroup, swap_optimizer, optimizer_swapper: what is on NVMe -> read
    grad_position, get_param_id, _get_param_partition_rank: where a part is -> saved and loaded
    sub_group_to_group_id, subgroup_to_device: who updates it -> the same
    backup_optimizer: no schedule changes its first group -> follows the other optimizer's
    offload_optimizer: on the CPU -> the same
    checkpoint_event_prologue, checkpoint_event_epilogue: shard all -> before weights are gathered
    _optimizer_states_and_gradient_swap_in, _optimizer_states_and_gradient_swap_out: files -> called
    _release_swap_buffers: drops what was read -> called
    _reassign_or_swap_out_partitioned_parameters: weights from master weights -> called
    _partition_all_parameters, _post_step: begin and end of a step -> called when loading
    fp32_partitioned_groups_flat, fp16_groups: master weights by sub-group -> saved and loaded
deepspeed.runtime.utils
    all_gather_dp_groups, is_model_parallel_parameter
deepspeed.comm.pg_utils
    is_parallel
deepspeed.runtime.pipe.engine.PipelineEngine
    pipe_buffers, fwd_outputs: outputs of micro-batches -> dropped when an engine closes
    reset_activation_shape: stages exchange shapes again -> called when the shape changes
deepspeed.runtime.pipe.engine
    TRAIN_BATCH_TIMER: keeps the time of every step -> reset
deepspeed.runtime.pipe.module.PipelineModule
    _partition_layers: builds all layers to count them -> PipelineStage sets given bounds
    _set_bounds, _topo, _local_start, _local_stop, forward_funcs: a stage's layers -> PipelineStage
    _synchronize_tied_weights: broadcasts at the start -> called after each step, without autograd
deepspeed.utils.groups
    _WORLD_GROUP: cached for all engines -> not destroyed with one
    mpu: global -> cleared when an engine closes
deepspeed.ops
    __compatible_ops__: enables shared-memory collectives -> disabled
deepspeed.runtime.lr_schedules.WarmupLR
    last_batch_iteration: counter of every schedule -> rolled back after a skipped step
deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler.update_scale
    loss scale already at minimum: text of a bare Exception -> TrainingError
deepspeed.runtime.bf16_optimizer.BF16_Optimizer
    fp32_groups_flat_partition, bf16_groups: master weights -> saved and loaded
    update_lp_params: rounds and gathers them -> called after a load
deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer
    fp32_groups_flat, fp16_groups: master weights -> saved and loaded
    loss_scale_config: dynamic loss scale -> the same
deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer
    fp32_groups, fp16_groups: master weights -> saved and loaded
deepspeed.runtime.zero.partition_parameters
    ds_numel: elements of a parameter that ZeRO-3 shards -> where a rank's part ends
    ds_id, ds_tensor: on a parameter that ZeRO-3 shards -> gather it, test its shard for NaN
torch.optim.adam.Adam
    grad_scale, found_inf: GradScaler's inputs to the fused kernel -> clip and skip
torch
    _foreach_copy_, _foreach_norm: one kernel for all tensors -> PlainEngine, parallel.grad_norm
    _assert_async: checks on the device -> ids in the vocab-parallel cross entropy
    _scaled_mm: fp8 matmul -> model.kernels.fp8_linear
torch._C
    _get_sdp_priority_order, _set_sdp_priority_order: order of attention kernels -> engine.speed
torch.distributed.distributed_c10d
    _get_default_store: where the ranks met -> distributed.launch, for the watchdog and long waits
torch.utils._python_dispatch
    TorchDispatchMode: sees every operator -> counts c10d operations (distributed.traffic, bench)
torch.ops.c10d.allreduce_.default
    _schema: name of the operator -> the same
torch.ops.aten
    _scaled_mm, _scaled_dot_product_flash_attention_for_cpu: kernels -> kept by recomputation
    _scaled_dot_product_flash_attention, _scaled_dot_product_cudnn_attention: kernels -> same
    _scaled_dot_product_efficient_attention: kernel -> same
    _softmax_backward_data: kernel -> model.kernels.blocked_attention
torch.ops.mkldnn
    _linear_pointwise: oneDNN matmul -> model.linear
torch.ops.torch_attn
    _varlen_attn: attention within documents -> kept by selective recomputation
""")
)
