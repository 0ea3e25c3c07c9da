"""Every private name of DeepSpeed and torch that FGPT reads or replaces, each with its reason.

No other file touches a private attribute of a DeepSpeed object. `tests/engine/test_patches.py`
checks that the installed versions still have every name in `PRIVATE`, and that no file of the
package uses a private name outside this one. A DeepSpeed upgrade starts with that test.

DeepSpeed is imported inside the functions: the plain engine must not pay for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# ---- the DeepSpeed engine --------------------------------------------------------------------


def replace_optimizer_step(
    engine: Any, make_step: Callable[[Callable[[Any], None]], Callable[[Any], None]]
) -> None:
    """Replace the engine's optimizer step by `make_step(upstream's step)`."""
    engine._take_model_step = make_step(engine._take_model_step)


def replace_checkpoint_files(engine: Any, files: Any) -> None:
    """Have `files` read and write checkpoints, and write no conversion scripts beside them.

    Upstream copies executable scripts into each checkpoint. FGPT runs no code out of a run
    directory, and a full disk would raise on rank 0 alone, outside of `files`.
    """
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda save_path: None


def release_pipeline_outputs(engine: Any) -> None:
    """Drop the outputs that a closed last stage keeps: their hooks keep the engine alive."""
    engine.pipe_buffers.clear()
    engine.loss = engine.fwd_outputs = None


def drop_step_times(engine: Any) -> None:
    """Forget the pipeline's step times, which upstream collects in a list without bound."""
    from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER

    engine.timers(TRAIN_BATCH_TIMER).reset()


def destroy_process_groups(groups: Iterable[dist.ProcessGroup]) -> None:
    """Destroy an engine's process groups, except the cached world group that the next one reuses.

    Also clears DeepSpeed's global mpu, which the next engine would inherit.
    """
    from deepspeed.utils import groups as deepspeed_groups

    deepspeed_groups.mpu = None
    for group in groups:
        if group is not deepspeed_groups._WORLD_GROUP:
            dist.destroy_process_group(group)


@contextlib.contextmanager
def without_shm_collectives() -> Iterator[None]:
    """Have DeepSpeed's CPU backend use gloo only, not its shared-memory collectives."""
    import deepspeed

    compatible = deepspeed.ops.__compatible_ops__
    saved = dict(compatible)
    compatible["deepspeed_shm_comm"] = False
    try:
        yield
    finally:
        compatible.update(saved)


def is_loss_scale_exhausted(error: Exception) -> bool:
    """True if DeepSpeed raised `error` because fp16 overflows at its smallest loss scale.

    Upstream raises a bare Exception, so only its text identifies it.
    """
    return "loss scale already at minimum" in str(error)


# ---- parameters and gradients ----------------------------------------------------------------


def full_weight(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's values, gathered if ZeRO-3 shards it. Collective then."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def full_gradient(parameter: nn.Parameter) -> Tensor:
    """Return the averaged gradient that the optimizer is about to use, float32. Collective.

    Valid between the backward pass and the optimizer step. `safe_get_full_grad` reads
    parameter.grad (ZeRO-0), the partitions of ZeRO 1-3, and BF16_Optimizer's float32 buffers.
    """
    from deepspeed.utils import safe_get_full_grad

    gradient: Tensor | None = safe_get_full_grad(parameter)
    if gradient is None:
        raise RuntimeError("DeepSpeed has no gradient for this parameter before its step")
    return gradient.float()


# ---- the ZeRO-1/2 optimizer ------------------------------------------------------------------


def is_plain_zero12(optimizer: Any) -> bool:
    """True for DeepSpeed's ZeRO-1/2 optimizer without CPU offload, not for a subclass of it."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return type(optimizer) is DeepSpeedZeroOptimizer and not optimizer.cpu_offload


def bypass_gradient_buckets(zero: Any) -> None:
    """Leave gradients where autograd puts them: with one data-parallel rank nothing is reduced."""
    zero.reduce_independent_p_g_buckets_and_remove_grads = lambda param, group: None
    zero.reduce_ipg_grads = lambda comm_dtype=None: None
    zero.setup_buckets = lambda: None  # would allocate the buckets


def skip_overflow_check(zero: Any) -> None:
    """Skip the per-tensor isfinite check: upstream's step tests the summed norm right after it."""
    zero.has_overflow = lambda partition_gradients=True: False


def preflattened_gradient(zero: Any, group: int) -> Tensor | None:
    """Return this rank's gradient partition [N] if ZeRO-2 accumulates it flat in float32."""
    flat: Tensor | None = zero._get_preflattened_grad_partition(group)
    return flat


def release_gradients(zero: Any, group: int) -> None:
    """Free a parameter group's gradients, as upstream's step does once it has copied them."""
    zero.free_grad_in_param_list(zero.bit16_groups[group])
    zero._release_preflattened_grad_buffers(group)
    zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None


def is_padding(gradient: Tensor) -> bool:
    """True for the zeros that fill up a gradient partition."""
    return bool(getattr(gradient, "_zero_padding", False))


def sum_over_model_ranks(zero: Any, value: Tensor) -> None:
    """All-reduce `value` [] in place over the model-parallel ranks, if there are several."""
    zero._model_parallel_all_reduce(tensor=value, op=dist.ReduceOp.SUM)


def finish_step(zero: Any, norm: Tensor) -> None:
    """Report the norm to the engine, and link new optimizer states to their parameters."""
    zero._global_grad_norm = norm
    zero._lazy_init_hp_params_optimizer_state()


# ---- ZeRO-3 with NVMe --------------------------------------------------------------------------


@contextlib.contextmanager
def checkpoint_without_nvme_files(engine: Any) -> Iterator[None]:
    """Save and load as without NVMe inside.

    Upstream copies the files of the NVMe directory into a checkpoint and back, but restores neither
    the 16-bit weights nor which states the files hold: a resumed run would go on from its initial
    weights with new states.
    """
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        yield
    finally:
        del engine.zero_nvme_offload_optimizer


def groups_on_nvme(zero: Any) -> list[int]:
    """The sub-groups whose master weights and states are files; upstream keeps small ones."""
    return [i for i in range(len(zero.fp16_groups)) if zero._swappable_optimizer_subgroup(i)]


def read_group_from_nvme(zero: Any, group: int) -> dict[str, Tensor]:
    """Return copies of a sub-group's master weights ("weights") and states, in host memory."""
    weights = zero.fp32_partitioned_groups_flat[group]
    zero._optimizer_states_and_gradient_swap_in(group)
    tensors = {"weights": weights.data, **zero.optimizer.state[weights]}
    copies = {
        name: tensor.clone()
        for name, tensor in tensors.items()
        if torch.is_tensor(tensor) and tensor.numel() == weights.numel()
    }
    zero._release_swap_buffers(group)
    return copies


def replace_nvme_load(zero: Any, read_group: Callable[[int], dict[str, Tensor]]) -> None:
    """Replace the loading of an optimizer's state where weights or states are on NVMe.

    Upstream's copies neither into files. `read_group` returns what `read_group_from_nvme` gave.
    """

    def load(saved: dict[str, Any], load_optimizer_states: bool = True) -> None:
        # 1. loss scale and what the optimizer keeps in memory
        zero.loss_scaler, zero.overflow = saved["loss_scaler"], saved["overflow"]
        zero.dynamic_loss_scale = saved["dynamic_loss_scale"]
        zero._set_fp32_optimizer_param_groups()
        zero.optimizer.load_state_dict(saved["optimizer_state_dict"])
        zero._clear_fp32_optimizer_param_groups()
        if zero.swap_optimizer:
            zero.optimizer_swapper.purge_state()
        # 2. each sub-group's master weights, states, and the weights of the forward pass
        zero._partition_all_parameters()
        on_nvme = groups_on_nvme(zero)
        for group, weights in enumerate(zero.fp32_partitioned_groups_flat):
            if group in on_nvme:
                values = read_group(group)
                zero._optimizer_states_and_gradient_swap_in(group)
                weights.data.copy_(values.pop("weights"))
                zero.optimizer.state[weights].update(values)
            else:
                weights.data.copy_(saved["fp32_flat_groups"][group].data)
            zero._reassign_or_swap_out_partitioned_parameters(group)
            if group in on_nvme:
                zero._optimizer_states_and_gradient_swap_out(group)
        zero._post_step(set())

    zero._rigid_load_state_dict = load


# ---- the drift table -------------------------------------------------------------------------


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
    _copy_recovery_script: copies scripts into checkpoints -> disabled
    checkpoint_engine: file access -> CheckpointFiles, which keeps errors
    skipped_steps, global_steps: counters -> read; skips are corrected one step later
    zero_nvme_offload_optimizer: copies NVMe files into checkpoints -> False there
    monitor: opens at once, x axis in samples -> Monitors
    flops_profiler: misses replaced products -> StepFlopsProfiler
    engine_timers: count evaluations to the next step -> reset after one
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
    params_in_partition, partition_size, free_grad_in_param_list, flatten, clip_grad
    flatten_dense_tensors_aligned, dp_process_group, real_dp_process_group, model_parallel_group
    model_parallel_rank, nccl_start_alignment_factor, allgather_bucket_size
deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3
    _rigid_load_state_dict: leaves weights and states on NVMe as they are -> replaced
    _swappable_optimizer_subgroup, swap_optimizer, optimizer_swapper: what is on NVMe -> read
    _optimizer_states_and_gradient_swap_in, _optimizer_states_and_gradient_swap_out: files -> called
    _release_swap_buffers: drops what was read -> called
    _reassign_or_swap_out_partitioned_parameters: weights from master weights -> called
    _set_fp32_optimizer_param_groups, _clear_fp32_optimizer_param_groups: fill the optimizer -> same
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
deepspeed.runtime.zero.partition_parameters
    ds_id, ds_tensor: on a parameter that ZeRO-3 shards -> gather it, test its shard for NaN
torch.optim.adam.Adam
    grad_scale, found_inf: GradScaler's inputs to the fused kernel -> clip and skip
torch
    _foreach_copy_, _foreach_norm: one kernel for all tensors -> PlainEngine, parallel.grad_norm
    _assert_async: checks on the device -> ids in the vocab-parallel cross entropy
    _scaled_mm: fp8 matmul -> model.kernels.fp8_linear
torch._C
    _get_sdp_priority_order, _set_sdp_priority_order: order of attention kernels -> engine.speed
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
