"""A few training steps, their gradients, and the differences between two layouts.

Gradients are read right before the optimizer step (`Engine.on_gradients`): averaged over the global
batch and complete, so that a missing reduction or a wrong scale shows; not clipped, so that an
error in one parameter does not spread to all through the norm.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fgpt.config.resolve import Resolved
from fgpt.data.loader import MicroBatch
from fgpt.distributed.agreements import gather_json
from fgpt.distributed.traffic import Traffic
from fgpt.engine.base import Engine, StepResult
from fgpt.engine.deepspeed.zero_engine import ZeroEngine
from fgpt.parallel.topology import Grid


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences that count as the same run."""

    loss: float
    norm: float
    gradient: float
    """Of one parameter: |a - b| / |b| in the L2 norm."""
    copies: float = 0.0
    """Copies of a tensor on several ranks must be identical."""


BOUNDS = {"fp32": Bounds(1e-5, 1e-4, 1e-4), "bf16": Bounds(5e-4, 1e-2, 8e-2)}


@dataclass
class Trace:
    """The run of the oracle."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Step (the first and the last) -> logical name -> full gradient, float32 on the CPU."""


@dataclass
class Verdict:
    """One layout compared with the oracle: the largest relative differences over all steps."""

    loss: float = 0.0
    """Of a step's loss."""
    norm: float = 0.0
    """Of a step's gradient norm, before clipping."""
    gradient: float = 0.0
    """Of a parameter's gradient."""
    where: str = ""
    """The parameter with the largest one."""
    copies: float = 0.0
    """Of a tensor that every tensor rank holds: between ranks, absolute, gradient or weight."""
    departures: dict[str, str] = field(default_factory=dict)
    """Kind (loss, gradient, norm, copies) -> where it first exceeded its bound; empty: same run."""

    @property
    def departs(self) -> str | None:
        """All departures in one line, None if there are none."""
        return "; ".join(self.departures.values()) or None

    def add(self, kind: str, step: int, differences: Mapping[str, float], bounds: Bounds) -> None:
        """Add one step's differences: parameter -> difference, or "" -> difference.

        If several parameters exceed the bound, the last in model order is named: the backward pass
        starts there, so it is where the error begins.
        """
        bound = getattr(bounds, kind)
        for name, difference in differences.items():
            if difference > getattr(self, kind):
                setattr(self, kind, difference)
                self.where = name or self.where
        beyond = [name for name, difference in differences.items() if difference > bound]
        if beyond and kind not in self.departures:
            of = f" of {beyond[-1]}" if beyond[-1] else ""
            size = differences[beyond[-1]]
            self.departures[kind] = f"{kind}{of} at step {step}: {size:.1e}, bound {bound:.0e}"


def micro_batches(resolved: Resolved, rank: int, step: int) -> list[MicroBatch]:
    """Return this rank's part of a global batch that is the same in every layout.

    Ids are random with falling frequency, so that the loss can fall; with `data.document_mask`
    documents are an eighth of a sample long on average.
    """
    run, batch = resolved.run, resolved.batch
    data = Grid.of(batch).coordinates(rank).data
    generator = torch.Generator().manual_seed(step)
    uniform = torch.rand(batch.global_size, resolved.seq_len + 1, generator=generator)
    ids = (run.model.vocab_size * uniform**4).long()
    begins = positions = None
    if run.data.document_mask:
        column = torch.arange(resolved.seq_len)
        uniform = torch.rand(batch.global_size, resolved.seq_len, generator=generator)
        starts_document = uniform < 8 / len(column)
        begins = (starts_document * column).cummax(dim=1).values
        positions = column - begins if run.data.reset_positions else None
    tensors = (ids[:, :-1], ids[:, 1:], begins, positions)
    grid = (batch.accumulation, batch.dp, batch.micro)
    local = [[None] * grid[0] if x is None else x.unflatten(0, grid)[:, data] for x in tensors]
    return [MicroBatch(*four) for four in zip(*local, strict=True)]


def train_steps(
    engine: Engine,
    resolved: Resolved,
    rank: int,
    steps: int,
    read_gradients: Callable[[int], None],
    traffic: Traffic | None = None,
) -> Iterator[tuple[int, StepResult]]:
    """Train, and yield (step number from 1, result) after each step.

    `read_gradients(step)` is called on all ranks before the optimizer step of the first and the
    last step. `traffic` counts the second step only, without the reading of gradients: the first
    step also sets up communicators.
    """

    def read() -> None:
        with nullcontext() if traffic is None else traffic.paused():
            read_gradients(step)

    for step in range(1, steps + 1):
        engine.on_gradients = read if step in (1, steps) else None
        with traffic if traffic is not None and step == 2 else nullcontext():
            result = engine.train_batch(micro_batches(resolved, rank, step - 1)).result()
        yield step, result


def trace(engine: Engine, resolved: Resolved, steps: int) -> Trace:
    """Return the oracle's trace, from one process."""
    oracle = Trace()

    def read_gradients(step: int) -> None:
        # a copy, because clipping changes the gradients in place
        full = {name: gradient.to("cpu", copy=True) for name, gradient in engine.gradients()}
        oracle.gradients[step] = full

    for _, result in train_steps(engine, resolved, 0, steps, read_gradients):
        oracle.losses.append(result.loss)
        oracle.norms.append(result.grad_norm)
    return oracle


def compare(
    engine: ZeroEngine,
    resolved: Resolved,
    rank: int,
    steps: int,
    oracle: Trace,
    bounds: Bounds,
    traffic: Traffic | None = None,
) -> Verdict:
    """Train the same steps in a layout, and return its differences from the oracle.

    Collective; ranks with an empty oracle only join the collectives, their verdict means nothing.
    """
    verdict = Verdict()
    gradients: dict[int, dict[str, float]] = {}
    copies: dict[int, dict[str, float]] = {}

    def read_gradients(step: int) -> None:
        gathered = engine.gradients()
        if oracle.losses:
            reference = oracle.gradients[step]
            gradients[step] = {n: relative_distance(g.cpu(), reference[n]) for n, g in gathered}
        else:
            deque(gathered, maxlen=0)  # join the collectives
        copies[step] = engine.copy_differences(gradients=True)

    for step, result in train_steps(engine, resolved, rank, steps, read_gradients, traffic):
        if not oracle.losses:
            continue
        loss = relative_difference(result.loss, oracle.losses[step - 1])
        norm = relative_difference(result.grad_norm, oracle.norms[step - 1])
        verdict.add("loss", step, {"": loss}, bounds)
        verdict.add("gradient", step, gradients.get(step, {}), bounds)
        verdict.add("norm", step, {"": norm}, bounds)
    differences = [*copies.items(), (steps, engine.copy_differences(gradients=False))]
    for step, local in differences:
        stages = gather_json(local, engine.deepspeed.device)
        verdict.add("copies", step, {n: d for stage in stages for n, d in stage.items()}, bounds)
    return verdict


def relative_difference(a: float, b: float) -> float:
    """Return |a - b| / |b|; infinite if that is no number."""
    if a == b:
        return 0.0
    difference = abs(a - b) / abs(b) if b else math.inf
    return math.inf if math.isnan(difference) else difference


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b| in the L2 norm; infinite if that is no number."""
    norm = torch.linalg.vector_norm(b, dtype=torch.float64)
    distance = torch.linalg.vector_norm(a - b, dtype=torch.float64)
    if float(norm) == 0 == float(distance):
        return 0.0
    return math.inf if bool(distance.isnan()) else float(distance / norm)
