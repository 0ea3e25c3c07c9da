"""The states of torch optimizers: created before they are filled, and their counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fgpt.optim.optimizers import MOMENTUM, OPTIMIZERS


@torch.no_grad()
def create_states(optimizer: Any, param_group: int, weights: Tensor) -> None:
    """Have an optimizer create the states of `weights`, unchanged weights and states of zero.

    By a step with a gradient of zero at rate 0: each implementation knows its own states.
    """
    group = optimizer.param_groups[param_group]
    if group.get("orthogonal"):  # a step would need the other ranks
        optimizer.state[weights][MOMENTUM] = torch.zeros_like(weights)
        return
    lr, gradient = group["lr"], weights.grad
    params = [g["params"] for g in optimizer.param_groups]
    for g in optimizer.param_groups:
        g["params"] = []
    group["params"], group["lr"], weights.grad = [weights], 0.0, torch.zeros_like(weights)
    try:
        optimizer.step()
    finally:
        group["lr"], weights.grad = lr, gradient
        for g, saved in zip(optimizer.param_groups, params, strict=True):
            g["params"] = saved


def states_of(group: Mapping[str, Any], states: Sequence[str]) -> list[str]:
    """Return those of `states` that the parameters of an optimizer's group have."""
    if "orthogonal" not in group:
        return list(states)
    own = (MOMENTUM,) if group["orthogonal"] else OPTIMIZERS["muon"].states
    return [state for state in states if state in own]


def read_updates(optimizer: Any, weights: Tensor) -> int:
    """Return the updates that the states of `weights` have seen; 0 where nothing counts them."""
    count = optimizer.state.get(weights, {}).get("step")
    if count is None:  # SGD has no counter
        return 0
    return int(count)


def set_updates(optimizer: Any, param_group: int, weights: Tensor, updates: int) -> None:
    """Set the counters that `read_updates` reads."""
    state, group = optimizer.state[weights], optimizer.param_groups[param_group]
    if isinstance(state.get("step"), Tensor):
        state["step"].fill_(updates)
    elif "step" in state:
        state["step"] = updates
    if "step" in group:  # DeepSpeed's FusedAdam counts in the group, too
        group["step"] = updates
