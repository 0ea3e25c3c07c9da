"""DeepSpeed's ZeRO-1/2 optimizer step with fewer kernels and without device synchronization.

Upstream tests each gradient with isfinite (four kernels) and takes its float32 norm (two more), and
Python waits for both results: 1,000 kernels for 150 tensors, more time than the optimizer, and then
an idle device. But a non-finite gradient makes the global norm non-finite, and one kernel takes all
norms. Torch's fused Adam can clip (`grad_scale`) and skip (`found_inf`) by device tensors, so that
Python never reads the result (`SyncFreeZeroStep`). On one data-parallel rank there is nothing to
reduce, and gradients bypass DeepSpeed's buckets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.comm.pg_utils import is_parallel
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor, nn

from fgpt.engine.deepspeed import patches
from fgpt.parallel.grad_norm import sum_of_squares


def make_sync_free(optimizer: Any, timed: bool) -> SyncFreeZeroStep | None:
    """Speed up a ZeRO-1/2 optimizer in place; other optimizers stay unchanged.

    `timed`: the JSON asks for time or memory breakdowns, which only upstream's step prints.

    Returns the new step, or None where upstream's step stays. Upstream's reports a skipped step at
    once; the new one leaves the flag on the device.
    """
    if not patches.is_plain_zero12(optimizer):
        return None
    optimizer.get_grad_norm_direct = partial(grad_norm, optimizer)
    if optimizer.compute_grad_norm:
        patches.skip_overflow_check(optimizer)
    has_separate_grad_buffer = optimizer.partition_gradients or optimizer.use_grad_accum_attribute
    if _is_single_replica(optimizer) and not has_separate_grad_buffer:
        patches.bypass_gradient_buckets(optimizer)
    if timed or not _can_skip_on_device(optimizer):
        return None
    optimizer.step = step = SyncFreeZeroStep(optimizer)
    return step


def _is_single_replica(optimizer: Any) -> bool:
    """True if this rank is the only data-parallel one."""
    return all(dist.get_world_size(g) == 1 for g in optimizer.real_dp_process_group)


def _can_skip_on_device(optimizer: Any) -> bool:
    """True for torch's fused Adam, without a loss scale that depends on the step's result."""
    inner = optimizer.optimizer
    fused = isinstance(inner, torch.optim.Adam) and all(g["fused"] for g in inner.param_groups)
    # the JSON can switch bf16's check off, but not fp32's
    checked = optimizer.check_grad_overflow or optimizer.dtype == torch.float32
    return bool(
        fused and checked and optimizer.compute_grad_norm and optimizer.dtype != torch.float16
    )


class SyncFreeZeroStep:
    """`step` of a ZeRO-1/2 optimizer around torch's fused Adam; never synchronizes."""

    def __init__(self, optimizer: Any):
        self.zero = optimizer
        self.norm = self.skipped = torch.zeros((), device=optimizer.device)
        """Of the latest step, float32 []: the gradient norm over all ranks before clipping; 1 if it
        is not finite and nothing was updated, else 0."""

    @torch.no_grad()
    def __call__(self, closure: None = None) -> None:
        """Clip or skip, update the masters, and all-gather the new weights."""
        zero = self.zero
        zero.micro_step_id = -1  # upstream's value before the first micro-batch
        zero.overflow = False  # a loaded checkpoint may have set it
        masters = zero.single_partition_of_fp32_groups
        # 1. give each float32 master its gradient partition, and free the originals
        counted = self._counted_gradients()
        for i, master in enumerate(masters):
            master.grad = self._flat_gradient(i).to(master.dtype)
            patches.release_gradients(zero, i)
        if counted is None:
            counted = [master.grad for master in masters]
        # 2. the global norm; not finite means: skip this step
        self.norm = sum_over_ranks(zero, sum_of_squares(counted, zero.device)).sqrt().float()
        self.skipped = (~self.norm.isfinite()).float()
        # 3. the fused kernel clips and skips by device tensors
        inner = zero.optimizer
        inner.grad_scale, inner.found_inf = self._clip_divisor(), self.skipped
        inner.step()
        patches.finish_step(zero, self.norm)
        # 4. copy the masters into this rank's partition of the weights
        for i, master in enumerate(masters):
            master.grad = None
            rank = dist.get_rank(group=zero.real_dp_process_group[i])
            zero.parallel_partitioned_bit16_groups[i][rank].data.copy_(master.data)
        # 5. gather all partitions
        self._all_gather_weights()

    def _counted_gradients(self) -> list[Tensor] | None:
        """Return the gradients that this rank adds to the norm; None means all of them."""
        zero = self.zero
        if not is_parallel(zero.model_parallel_group):
            return None
        return [
            g
            for i in range(len(zero.bit16_groups))
            for g in without_duplicates(
                zero, zero.averaged_gradients[i], zero.params_in_partition[i]
            )
        ]

    def _flat_gradient(self, i: int) -> Tensor:
        """Return this rank's gradient partition of group `i` [N], padded as upstream pads it."""
        zero = self.zero
        flat = patches.preflattened_gradient(zero, i)
        if flat is not None:
            return flat
        tensors, group = zero.averaged_gradients[i], zero.real_dp_process_group[i]
        if dist.get_rank(group=group) == dist.get_world_size(group=group) - 1:
            size = int(zero.partition_size[i])
            flat = zero.flatten_dense_tensors_aligned(tensors, size)
        else:
            flat = zero.flatten(tensors)
        assert flat is not None
        return flat

    def _clip_divisor(self) -> Tensor | None:
        """Return what the kernel divides gradients by [], or None without clipping."""
        limit = self.zero.clip_grad
        return None if limit == 0 else ((self.norm + 1e-6) / limit).clamp(min=1.0)

    def _all_gather_weights(self) -> None:
        """Update the flat weight tensors on every rank; the parameters are views of them."""
        if not _is_single_replica(self.zero):
            patches.gather_zero12_weights(self.zero)


def grad_norm(
    optimizer: Any, gradients: Iterable[Tensor], params: Sequence[nn.Parameter], norm_type: int = 2
) -> Tensor:
    """Return the L2 norm [] of gradients over all ranks, -1 if not finite.

    Replaces DeepSpeedZeroOptimizer.get_grad_norm_direct.
    """
    assert norm_type == 2
    counted = without_duplicates(optimizer, gradients, params)
    norm = sum_over_ranks(optimizer, sum_of_squares(counted, optimizer.device)).sqrt().float()
    return torch.where(norm.isfinite(), norm, -1.0)


def without_duplicates(
    optimizer: Any, gradients: Iterable[Tensor], params: Sequence[nn.Parameter]
) -> list[Tensor]:
    """Return the gradients that this rank adds to the norm.

    One stage counts a tied parameter; the first tensor rank counts a replicated one.
    """
    unpadded = (g for g in gradients if not patches.is_padding(g))
    is_first = optimizer.model_parallel_rank == 0
    return [
        g
        for g, p in zip(unpadded, params, strict=False)  # this partition's gradients come first
        if not getattr(p, "ds_pipe_replicated", False)
        and (is_first or is_model_parallel_parameter(p))
    ]


def sum_over_ranks(optimizer: Any, square: Tensor) -> Tensor:
    """All-reduce a sum of squares [] in place over data- and model-parallel ranks."""
    if dist.get_world_size(optimizer.dp_process_group) > 1:
        dist.all_reduce(square, group=optimizer.dp_process_group)
    patches.sum_over_model_ranks(optimizer, square)
    return square
