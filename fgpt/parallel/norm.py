"""The norm of a gradient that no rank holds alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from fgpt.parallel.topology import Groups


def global_norm(parameters: Iterable[nn.Parameter], groups: Groups) -> torch.Tensor:
    """L2 norm [] of the whole gradient, float32, the same on all ranks; nan or inf if any is.

    `parameters`: this rank's, with gradients that are averaged over its replicas already; the ranks
    of `groups.model` call this together. Summed in float64: torch's
    float32 norm on a CPU is low by 1e-5 for a million elements.
    """
    squares = [
        torch.linalg.vector_norm(p.grad, dtype=torch.float64).square()
        for p in parameters
        if p.grad is not None and _counts_here(p, groups)
    ]
    total = torch.stack(squares).sum()
    if groups.grid.pp * groups.grid.tp > 1:
        dist.all_reduce(total, group=groups.model)
    return total.sqrt().float()


def _counts_here(parameter: nn.Parameter, groups: Groups) -> bool:
    """Whether this rank is the one to count it, by the marks that DeepSpeed reads too.

    What is in two stages (a tied head) is marked in the second, what is cut over the tensor ranks
    on each of them; the rest is whole there, and the first counts it.
    """
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return groups.place.tensor == 0 or getattr(parameter, "model_parallel", False)
