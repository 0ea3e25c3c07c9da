"""DeepSpeed's ZeRO-1 and -2 optimizer without its many small operations.

Each step it asks of every gradient whether it is finite (four operations), then takes its norm in
float32 (two more), and reads both answers on the host: for 150 tensors that is 1,000 kernels, more
time than the optimizer itself. A norm that is not finite says the same, and one operation takes the
norms of all tensors. Where one rank has all of the data, there is nothing to sum up either:
gradients need not go through DeepSpeed's buckets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn


def make_lean(optimizer: Any) -> None:
    """Replace these operations of a ZeRO-1 or -2 optimizer; leave any other one alone."""
    if type(optimizer) is not DeepSpeedZeroOptimizer or optimizer.cpu_offload:
        return
    optimizer.get_grad_norm_direct = partial(gradient_norm, optimizer)
    if optimizer.compute_grad_norm:
        # `step` asks next whether the norm is finite, which is summed over all ranks, too
        optimizer.has_overflow = lambda partition_gradients=True: False
    if _alone(optimizer):
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = lambda param, group: None
        optimizer.reduce_ipg_grads = lambda comm_dtype=None: None


def _alone(optimizer: Any) -> bool:
    """Whether this rank has all of the data, and gradients add up where autograd leaves them."""
    alone = all(dist.get_world_size(g) == 1 for g in optimizer.real_dp_process_group)
    return alone and not optimizer.partition_gradients and not optimizer.use_grad_accum_attribute


def gradient_norm(
    optimizer: Any, gradients: Iterable[Tensor], params: Sequence[nn.Parameter], norm_type: int = 2
) -> Tensor:
    """L2 norm [] of these parameters' gradients over all ranks; -1 where it is not finite.

    What DeepSpeed's method of this name returns: a parameter that several stages hold is counted
    once, one that all tensor ranks hold by the first of them.
    """
    assert norm_type == 2
    real = (g for g in gradients if not getattr(g, "_zero_padding", False))
    first = optimizer.model_parallel_rank == 0
    counted = [
        g
        for g, p in zip(real, params, strict=False)  # gradients of this rank's part come first
        if not getattr(p, "ds_pipe_replicated", False) and (first or is_model_parallel_parameter(p))
    ]
    square = square_sum(counted, optimizer.device)
    dist.all_reduce(square, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=square, op=dist.ReduceOp.SUM)
    norm = square.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


def square_sum(gradients: Sequence[Tensor], device: Any) -> Tensor:
    """Sum of all squares, float32 []. On a CPU added up in float64, see
    `fgpt.engine.precision.gradient_norm`.
    """
    if not gradients:
        return torch.zeros((), device=device)
    dtype = torch.float64 if gradients[0].device.type == "cpu" else torch.float32
    norms = torch._foreach_norm(list(gradients), 2, dtype=dtype)
    return torch.stack(norms).square().sum().float()
