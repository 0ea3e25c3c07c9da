"""The norm of a gradient that no rank holds alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgpt.parallel.topology import ProcessGroups

ROW = 256
"""Elements that are summed in float32 on a CPU, before float64."""


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """Sum [] of the squares of all elements, float64, on `device`, where the tensors are.

    On a CPU float32 for ROW elements at a time, float64 from there: torch 2.13's float32 norm on a
    CPU is low by 1e-5 for a tensor of 1 M elements and by 9e-5 for one of 4 M, more than any other
    difference between two engines; its float64 norm takes ten times as long.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    if tensors[0].is_cuda:
        norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
        return torch.stack(norms).double().square().sum()
    return torch.stack([_square_sum(tensor.detach().reshape(-1)) for tensor in tensors]).sum()


def _square_sum(flat: Tensor) -> Tensor:
    cut = len(flat) // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:cut].float().view(-1, ROW), dim=1)
    return rows.double().square().sum() + flat[cut:].double().square().sum()


def global_grad_norm(parameters: Iterable[nn.Parameter], groups: ProcessGroups) -> Tensor:
    """L2 norm [] of the whole gradient, float32, the same on all ranks; nan or inf if any is.

    `parameters`: this rank's, with gradients that are averaged over its replicas already; the ranks
    of `groups.model` call this together.
    """
    counted = [p for p in parameters if p.grad is not None and _counts_here(p, groups)]
    device = counted[0].device if counted else "cpu"
    total = sum_of_squares([p.grad for p in counted if p.grad is not None], device)
    if groups.grid.pp * groups.grid.tp > 1:
        dist.all_reduce(total, group=groups.model)
    return total.sqrt().float()


def _counts_here(parameter: nn.Parameter, groups: ProcessGroups) -> bool:
    """Whether this rank is the one to count it, by the marks that DeepSpeed reads too.

    What is in two stages (a tied head) is marked in the second, what is cut over the tensor ranks
    on each of them; the rest is whole there, and the first counts it.
    """
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return groups.coordinates.tensor == 0 or getattr(parameter, "model_parallel", False)
