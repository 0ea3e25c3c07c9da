"""Bytes per parameter of weights, gradients and optimizer states, as ZeRO divides them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from fgpt.plan.planned_run import Engine, PlannedPrecision, PlannedRun

Place = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter on one rank; fractions where ZeRO shards."""

    weights: Fraction
    gradients: Fraction
    optimizer: Fraction
    """The optimizer's states, and its fp32 copy of the weights."""
    host: Fraction


def divided_states(
    weights: int | Fraction,
    gradients: int | Fraction,
    optimizer: int | Fraction,
    *,
    zero_stage: int,
    shards: int,
    optimizer_place: Place = "device",
    params_place: Place = "device",
) -> StateBytes:
    """Divide bytes per parameter among `shards` ranks by DeepSpeed's ZeRO stages: from stage 1 on
    the optimizer's, from stage 2 on also the gradients, in stage 3 also the weights.
    """

    def sharded(size: int | Fraction, lowest_stage: int) -> Fraction:
        return Fraction(size) / (shards if zero_stage >= lowest_stage else 1)

    weights, gradients = sharded(weights, 3), sharded(gradients, 2)
    optimizer, host = sharded(optimizer, 1), Fraction(0)
    if optimizer_place != "device":
        if optimizer_place == "host":
            host += optimizer + sharded(4, 1)  # with fp32 gradients
        # ZeRO-1 moves complete gradients to the host, ZeRO 2 and 3 each as it is computed
        gradients = gradients if zero_stage == 1 else Fraction(0)
        optimizer = Fraction(0)
    if params_place != "device":
        if params_place == "host":
            host += weights
        weights = Fraction(0)
    return StateBytes(weights, gradients, optimizer, host)


@dataclass(frozen=True)
class PlannedStates:
    """Bytes per parameter of one rank of a planned run."""

    weights: float
    gradients: float
    master: float
    """The optimizer's fp32 copy of the weights."""
    optimizer: float
    step: float
    """Of tensors that live during the optimizer's step only, one for each parameter,"""
    flat_step: float
    """and those that are one tensor for all parameters."""
    freed: float
    """Freed after the engine's start, but kept by torch's allocator."""
    host: float


def planned_states(run: PlannedRun) -> PlannedStates:
    """Return the bytes per parameter that the run's engine keeps."""
    return _planned_states(
        run.engine,
        run.precision,
        run.zero_stage,
        run.n_shards,
        run.gradient_bytes,
        run.reduced_bytes,
        run.state_bytes,
        run.accumulation > 1,
        run.fused_optimizer,
        run.offloads_optimizer,
        run.offloads_params,
    )


@lru_cache(maxsize=4096)
def _planned_states(
    engine: Engine,
    precision: PlannedPrecision,
    zero_stage: int,
    shards: int,
    gradient: int,
    reduced: int,
    state: float,
    accumulates: bool,
    fused_optimizer: bool,
    offloads_optimizer: bool,
    offloads_params: bool,
) -> PlannedStates:
    element = 4 if precision == "fp32" else 2
    master = 0 if precision == "fp32" and (engine != "deepspeed" or zero_stage == 0) else 4
    step = freed = 0.0
    own = shards if zero_stage else 1
    if engine == "fsdp":  # shards of weights and gradients are fp32, and weights the only copy
        element, gradient, master, zero_stage = 4, 4, 0, 3
    elif element == 2 and gradient == 2:
        step = 4 / own  # the optimizer's fp32 gradients
        if engine == "deepspeed" and zero_stage == 1:
            step += 2 / own  # and the 16-bit ones that they are made from
    elif element == 2 and engine == "deepspeed" and zero_stage < 2 and accumulates:
        # BF16_Optimizer: 16-bit gradients beside their fp32 sums; it makes the weights one flat
        # tensor on the device, and the first ones are freed
        gradient += 2
        freed = 2.0
    if not fused_optimizer:
        step += 4 / own  # torch's foreach Adam: the roots of the second moments, fp32
    if offloads_optimizer:
        step = 0.0
    is_flat = engine == "deepspeed"
    states = divided_states(
        element,
        gradient,
        Fraction(master) + Fraction(state),
        zero_stage=zero_stage,
        shards=shards,
        optimizer_place="host" if offloads_optimizer else "device",
        params_place="host" if offloads_params else "device",
    )
    master_share = master / (master + state)
    return PlannedStates(
        weights=float(states.weights),
        gradients=float(states.gradients),
        master=float(states.optimizer) * master_share,
        optimizer=float(states.optimizer) * (1 - master_share),
        step=0.0 if is_flat else step,
        flat_step=step if is_flat else 0.0,
        freed=freed,
        host=float(states.host),
    )
