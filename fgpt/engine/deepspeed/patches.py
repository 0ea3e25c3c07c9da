"""Access to what is private in DeepSpeed: no other file touches a private attribute of its objects.

`private_names` lists every name that is used here or elsewhere in the package, with its reason. A
DeepSpeed upgrade starts with `tests/engine/test_patches.py`, which looks each of them up.

DeepSpeed is imported inside the functions: the plain engine must not pay for it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgpt.errors import FgptError

# ---- the DeepSpeed engine --------------------------------------------------------------------


def replace_optimizer_step(
    engine: Any, make_step: Callable[[Callable[[Any], None]], Callable[[Any], None]]
) -> None:
    """Replace the engine's optimizer step by `make_step(upstream's step)`."""
    engine._take_model_step = make_step(engine._take_model_step)


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


@contextlib.contextmanager
def all_sharded(optimizer: Any) -> Iterator[None]:
    """With ZeRO-3, every parameter is sharded inside, so that each can be gathered. Collective.

    A forward pass leaves parameters gathered, or on their way, for the next one. All ranks raise an
    FgptError together, and training may go on after it: then the end of this is not left out.
    """
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield
        return
    optimizer.checkpoint_event_prologue()
    try:
        yield
    except FgptError:
        optimizer.checkpoint_event_epilogue()
        raise
    optimizer.checkpoint_event_epilogue()


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


def link_round_robin_parameters(optimizer: Any) -> None:
    """Link parameters to their part of ZeRO-1/2's partitions in the order that these have.

    With round_robin_gradients and without padding, upstream links by another order, and
    `full_gradient` would read other parameters' gradients. With padding it takes the offsets.
    """
    if not getattr(optimizer, "round_robin_gradients", False):
        return
    paddings = optimizer.round_robin_bit16_padding
    optimizer.round_robin_bit16_padding = [[True] for _ in paddings]
    optimizer._link_all_hp_params()
    optimizer.round_robin_bit16_padding = paddings


# ---- master weights and optimizer states -------------------------------------------------------


class MasterPart(NamedTuple):
    """Where a rank's part of one parameter is in a flat tensor of master weights."""

    parameter: nn.Parameter
    begin: int
    """First element of the flattened parameter."""
    size: int
    """Number of elements."""
    offset: int
    """Where they begin in the flat tensor."""


class MasterTensor(NamedTuple):
    """A tensor of master weights, the key of its states in `optimizer.state`."""

    weights: Tensor
    parts: list[MasterPart]
    optimizer: Any
    param_group: int
    """Index of its group in the optimizer."""
    sub_group: int | None = None
    """ZeRO-3's number of it."""


def master_tensors(optimizer: Any) -> list[MasterTensor]:
    """Return this rank's master weights, for each of DeepSpeed's optimizers."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _zero3_masters(optimizer)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        partitions = optimizer.single_partition_of_fp32_groups
        orders = optimizer.round_robin_bit16_groups
        return _partitioned_masters(
            optimizer, partitions, orders, optimizer.round_robin_bit16_offsets
        )
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        orders = optimizer.bf16_groups
        sizes = [[parameter.numel() for parameter in group] for group in orders]
        offsets = [[0, *itertools.accumulate(group)][:-1] for group in sizes]
        partitions = optimizer.fp32_groups_flat_partition
        return _partitioned_masters(optimizer, partitions, orders, offsets)
    # without ZeRO: one tensor per group, or one per parameter
    if hasattr(optimizer, "fp32_groups_flat"):
        return [
            MasterTensor(weights, _consecutive_parts(parameters), optimizer.optimizer, i)
            for i, (weights, parameters) in enumerate(
                zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
            )
        ]
    inner = getattr(optimizer, "optimizer", optimizer)
    masters = getattr(optimizer, "fp32_groups", [g["params"] for g in optimizer.param_groups])
    groups = getattr(optimizer, "fp16_groups", masters)
    return [
        MasterTensor(weights, [MasterPart(parameter, 0, parameter.numel(), 0)], inner, i)
        for i, pairs in enumerate(zip(masters, groups, strict=True))
        for weights, parameter in zip(*pairs, strict=True)
    ]


def is_partitioned(optimizer: Any) -> bool:
    """Whether each replica has its own part of the master weights, not a copy of all."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    return any(hasattr(optimizer, name) for name in (*names, "fp32_groups_flat_partition"))


def _consecutive_parts(parameters: Iterable[nn.Parameter]) -> list[MasterPart]:
    parts, offset = [], 0
    for parameter in parameters:
        parts.append(MasterPart(parameter, 0, parameter.numel(), offset))
        offset += parameter.numel()
    return parts


def _partitioned_masters(
    optimizer: Any, partitions: Any, orders: Any, offsets: Any
) -> list[MasterTensor]:
    """Those of ZeRO-1/2 and BF16_Optimizer: equal parts of each group's parameters, laid out in
    `orders` at `offsets`.

    Upstream's own links (`_hp_mapping`) are wrong with round_robin_gradients.
    """
    tensors = []
    for i, weights in enumerate(partitions):
        first = weights.numel() * dist.get_rank(group=optimizer.real_dp_process_group[i])
        parts = []
        for parameter, offset in zip(orders[i], offsets[i], strict=True):
            begin = max(first - offset, 0)
            end = min(first + weights.numel() - offset, parameter.numel())
            if begin < end:
                part = MasterPart(parameter, begin, end - begin, offset + begin - first)
                parts.append(part)
        tensors.append(MasterTensor(weights, parts, optimizer.optimizer, i))
    return tensors


def _zero3_masters(zero: Any) -> list[MasterTensor]:
    """ZeRO-3 cuts each parameter into equal parts, the last of which is padded."""
    tensors = []
    for i, weights in enumerate(zero.fp32_partitioned_groups_flat):
        parts = []
        for parameter in zero.fp16_groups[i]:
            _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            begin = min(size * zero._get_param_partition_rank(parameter), parameter.ds_numel)
            size = min(begin + size, parameter.ds_numel) - begin
            parts.append(MasterPart(parameter, begin, size, offset))
        on_device = zero.offload_optimizer and zero.subgroup_to_device[i] != "cpu"
        inner = zero.backup_optimizer if on_device else zero.optimizer
        tensors.append(MasterTensor(weights, parts, inner, zero.sub_group_to_group_id[i], i))
    return tensors


def follow_with_second_optimizer(engine: Any) -> list[torch.optim.Optimizer]:
    """Have the optimizer of what is not offloaded (`offload_optimizer.ratio` below 1) follow the
    other one's hyperparameters; return it, or nothing where there is none.

    Upstream gives it a copy of the first parameter group, which no schedule changes; the other
    groups are the same objects in both.
    """
    second = getattr(engine.optimizer, "backup_optimizer", None)
    if second is None:
        return []
    first_group = engine.basic_optimizer.param_groups[0]

    def follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        values = {name: value for name, value in first_group.items() if name != "params"}
        optimizer.param_groups[0].update(values)

    second.register_step_pre_hook(follow)
    return [second]


@torch.no_grad()
def update_weights(optimizer: Any) -> None:
    """Set the weights of the forward pass to the rounded master weights. Collective."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for i in range(len(optimizer.fp32_partitioned_groups_flat)):
            if not is_on_nvme(optimizer, i):  # else done with the sub-group in memory
                optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer._post_step(set())
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        for i, master in enumerate(optimizer.single_partition_of_fp32_groups):
            rank = dist.get_rank(group=optimizer.real_dp_process_group[i])
            optimizer.parallel_partitioned_bit16_groups[i][rank].data.copy_(master.data)
        gather_zero12_weights(optimizer)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        optimizer.update_lp_params()
    else:  # without ZeRO
        for tensor in master_tensors(optimizer):
            for part in tensor.parts:
                if part.parameter is not tensor.weights:
                    values = tensor.weights.view(-1)[part.offset :][: part.size]
                    part.parameter.copy_(values.view_as(part.parameter))


def gather_zero12_weights(zero: Any) -> None:
    """Gather ZeRO-1/2's partitions of the weights; the parameters are views of them. Collective."""
    from deepspeed.runtime.utils import all_gather_dp_groups

    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )


def loss_scaler(optimizer: Any) -> Any:
    """The object with fp16's dynamic loss scale, or None."""
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(
        optimizer, "loss_scale_config", None
    )
    is_dynamic = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
    return scaler if is_dynamic else None


# ---- ZeRO-3 with NVMe --------------------------------------------------------------------------


def is_on_nvme(zero: Any, sub_group: int) -> bool:
    """Whether a sub-group's master weights and states are files; upstream keeps small ones."""
    return bool(zero._swappable_optimizer_subgroup(sub_group))


@contextlib.contextmanager
def sub_group_in_memory(zero: Any, sub_group: int, *, changes: bool) -> Iterator[None]:
    """Read a sub-group's master weights and states from NVMe; inside they are in host memory.

    `changes`: write them, and the weights of the forward pass, afterwards.
    """
    zero._optimizer_states_and_gradient_swap_in(sub_group)
    yield
    if changes:
        zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        zero._optimizer_states_and_gradient_swap_out(sub_group)
    else:
        zero._release_swap_buffers(sub_group)


def prepare_for_new_weights(optimizer: Any) -> None:
    """With ZeRO-3, shard all parameters again, and forget states on NVMe."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()
        if optimizer.swap_optimizer:
            optimizer.optimizer_swapper.purge_state()
