"""DeepSpeed's ZeRO-1 and -2 step without its many small operations, and without waiting.

Each step DeepSpeed asks of every gradient whether it is finite (four operations), then takes its
norm in float32 (two more), and Python waits for both answers: for 150 tensors that is 1,000
kernels, more time than the optimizer itself, and an idle device after them. A norm that is not
finite says the same, and one operation takes the norms of all tensors. Clipping, and dropping a
step that is not finite, can both be left to the kernel of torch's fused Adam, which is told by
tensors: nothing waits (`SyncFreeZeroStep`). With one data-parallel rank there is nothing to reduce
either, and gradients bypass DeepSpeed's buckets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.comm.pg_utils import is_parallel
from deepspeed.runtime.utils import all_gather_dp_groups, is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from fgpt.parallel.grad_norm import sum_of_squares


def make_sync_free(optimizer: Any, timed: bool) -> SyncFreeZeroStep | None:
    """Replace these operations of a ZeRO-1 or -2 optimizer; leave any other one alone.

    `timed`: the JSON asks for the breakdowns that DeepSpeed's own step prints; it stays.

    Returns what its step has become, or None where it stays DeepSpeed's: that tells its engine at
    once whether the step was skipped, a `SyncFreeZeroStep` does not.
    """
    if type(optimizer) is not DeepSpeedZeroOptimizer or optimizer.cpu_offload:
        return None
    optimizer.get_grad_norm_direct = partial(gradient_norm, optimizer)
    if optimizer.compute_grad_norm:
        # `step` asks next whether the norm is finite, which is summed over all ranks, too
        optimizer.has_overflow = lambda partition_gradients=True: False
    sums_apart = optimizer.partition_gradients or optimizer.use_grad_accum_attribute
    if _alone(optimizer) and not sums_apart:
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = lambda param, group: None
        optimizer.reduce_ipg_grads = lambda comm_dtype=None: None
        optimizer.setup_buckets = lambda: None  # would allocate them
    if timed or not _can_be_told_by_tensors(optimizer):
        return None
    optimizer.step = step = SyncFreeZeroStep(optimizer)
    return step


def _alone(optimizer: Any) -> bool:
    """Whether this rank has all of the data."""
    return all(dist.get_world_size(g) == 1 for g in optimizer.real_dp_process_group)


def _can_be_told_by_tensors(optimizer: Any) -> bool:
    """Whether the optimizer inside is torch's fused Adam, and no loss scale depends on the step."""
    inner = optimizer.optimizer
    fused = isinstance(inner, torch.optim.Adam) and all(g["fused"] for g in inner.param_groups)
    # bf16's check can be switched off, fp32's cannot
    checked = optimizer.check_grad_overflow or optimizer.dtype == torch.float32
    return bool(
        fused and checked and optimizer.compute_grad_norm and optimizer.dtype != torch.float16
    )


class SyncFreeZeroStep:
    """`step` of a ZeRO-1 or -2 optimizer around torch's fused Adam; never waits for the device."""

    def __init__(self, optimizer: Any):
        self.zero = optimizer
        self.norm = self.skipped = torch.zeros((), device=optimizer.device)
        """Of the latest step, float32 []: the gradient's norm over all ranks, before clipping; 1 if
        it is not finite and the step has changed nothing, else 0."""

    @torch.no_grad()
    def __call__(self, closure: None = None) -> None:
        """Clip, step, and spread the new weights."""
        zero = self.zero
        zero.micro_step_id = -1  # DeepSpeed's sign for: before the next step's first micro-batch
        zero.overflow = False  # a checkpoint may say something else
        masters = zero.single_partition_of_fp32_groups
        counted = self._counted()
        for i, master in enumerate(masters):
            master.grad = self._gradient(i).to(master.dtype)
            zero.free_grad_in_param_list(zero.bit16_groups[i])
            zero._release_preflattened_grad_buffers(i)
            zero.averaged_gradients[i] = zero.all_grad_tensors[i] = None
        if counted is None:
            counted = [master.grad for master in masters]
        self.norm = sum_over_ranks(zero, sum_of_squares(counted, zero.device)).sqrt().float()
        self.skipped = (~self.norm.isfinite()).float()
        zero._global_grad_norm = self.norm
        inner = zero.optimizer
        inner.grad_scale, inner.found_inf = self._divisor(), self.skipped
        inner.step()
        zero._lazy_init_hp_params_optimizer_state()
        for i, master in enumerate(masters):
            master.grad = None
            place = dist.get_rank(group=zero.real_dp_process_group[i])
            zero.parallel_partitioned_bit16_groups[i][place].data.copy_(master.data)
        self._spread()

    def _counted(self) -> list[Tensor] | None:
        """Which gradients this rank adds to the norm, None: all."""
        zero = self.zero
        if not is_parallel(zero.model_parallel_group):
            return None
        return [
            g
            for i in range(len(zero.bit16_groups))
            for g in counted_once(zero, zero.averaged_gradients[i], zero.params_in_partition[i])
        ]

    def _gradient(self, i: int) -> Tensor:
        """This rank's part of a group's gradients [N], with DeepSpeed's padding."""
        zero = self.zero
        flat: Tensor | None = zero._get_preflattened_grad_partition(i)
        if flat is not None:  # float32 sums of ZeRO-2
            return flat
        tensors = zero.averaged_gradients[i]
        last = dist.get_world_size(group=zero.real_dp_process_group[i]) - 1
        if dist.get_rank(group=zero.real_dp_process_group[i]) == last:
            padded: Tensor = zero.flatten_dense_tensors_aligned(
                tensors, int(zero.partition_size[i])
            )
            return padded
        whole: Tensor = zero.flatten(tensors)
        return whole

    def _divisor(self) -> Tensor | None:
        """What the kernel is to divide gradients by [], None: nothing."""
        limit = self.zero.clip_grad
        return None if limit == 0 else ((self.norm + 1e-6) / limit).clamp(min=1.0)

    def _spread(self) -> None:
        """Give every rank all weights; they are views of these flat tensors."""
        zero = self.zero
        if _alone(zero):
            return
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )


def gradient_norm(
    optimizer: Any, gradients: Iterable[Tensor], params: Sequence[nn.Parameter], norm_type: int = 2
) -> Tensor:
    """L2 norm [] of these parameters' gradients over all ranks; -1 where it is not finite.

    What DeepSpeed's method of this name returns.
    """
    assert norm_type == 2
    counted = counted_once(optimizer, gradients, params)
    norm = sum_over_ranks(optimizer, sum_of_squares(counted, optimizer.device)).sqrt().float()
    return torch.where(norm.isfinite(), norm, -1.0)


def counted_once(
    optimizer: Any, gradients: Iterable[Tensor], params: Sequence[nn.Parameter]
) -> list[Tensor]:
    """The gradients that this rank adds to the norm: a parameter that several stages hold is
    counted by one of them, one that all tensor ranks hold by the first of them.
    """
    real = (g for g in gradients if not getattr(g, "_zero_padding", False))
    first = optimizer.model_parallel_rank == 0
    return [
        g
        for g, p in zip(real, params, strict=False)  # gradients of this rank's part come first
        if not getattr(p, "ds_pipe_replicated", False) and (first or is_model_parallel_parameter(p))
    ]


def sum_over_ranks(optimizer: Any, square: Tensor) -> Tensor:
    """Sum [] of a number over the ranks that hold other gradients."""
    if dist.get_world_size(optimizer.dp_process_group) > 1:
        dist.all_reduce(square, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=square, op=dist.ReduceOp.SUM)
    return square
