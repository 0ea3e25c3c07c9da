"""What a few steps of training leave behind, and how far two such traces are apart.

The gradient of a step is read where every engine has it, whole and used: out of Adam's first
moment, m_k = b1 m_{k-1} + (1 - b1) g_k. It is the averaged, clipped gradient that the optimizer was
given, so that a lost reduction, a wrong scale and a wrong norm all show in it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fgpt.config.resolve import Resolved
from fgpt.engine.base import Engine, MicroBatch
from fgpt.parallel.topology import Grid


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences that count as the same run."""

    loss: float
    norm: float
    gradient: float
    """Of one tensor: |a - b| / |b| in the L2 norm."""


_NOTHING = nullcontext()
BOUNDS = {"fp32": Bounds(1e-5, 1e-4, 1e-4), "bf16": Bounds(1e-3, 2e-2, 1e-1)}


@dataclass
class Trace:
    """The oracle's run."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Step (the first and the last) -> logical name -> whole gradient, float32 on the CPU."""


@dataclass
class Verdict:
    """One layout against the oracle: the largest relative differences over all steps."""

    loss: float = 0.0
    """Of a step's loss."""
    norm: float = 0.0
    """Of a step's gradient norm, before clipping."""
    gradient: float = 0.0
    """Of a parameter's gradient."""
    where: str = ""
    """The parameter with the largest one."""
    departs: str | None = None
    """The first value beyond its bound; None: the layout trains the same run."""

    def add(self, kind: str, name: str, step: int, difference: float, bounds: Bounds) -> None:
        """Take one difference into account; `name`: the parameter's, for a gradient."""
        if difference > getattr(self, kind):
            setattr(self, kind, difference)
            self.where = name or self.where
        bound = getattr(bounds, kind)
        if self.departs is None and difference > bound:
            what = f"{kind} of {name}" if name else kind
            self.departs = f"{what} at step {step}: {difference:.1e}, bound {bound:.0e}"


def micro_batches(resolved: Resolved, rank: int, step: int) -> list[MicroBatch]:
    """This rank's part of a global batch that is the same in every layout.

    Ids are drawn with falling frequency, so that there is something to learn.
    """
    run, batch = resolved.run, resolved.batch
    assert run.data.seq_len is not None  # resolved
    data = Grid.of(batch).place(rank).data
    generator = torch.Generator().manual_seed(step)
    uniform = torch.rand(batch.global_, run.data.seq_len + 1, generator=generator)
    ids = (run.model.vocab_size * uniform**4).long()
    grid = ids.unflatten(0, (batch.accumulation, batch.dp, batch.micro))
    return [(part[:, :-1], part[:, 1:]) for part in grid[:, data]]


def follow(
    engine: Engine,
    resolved: Resolved,
    rank: int,
    second_step: AbstractContextManager[object] = _NOTHING,
) -> Iterator[tuple[int, float, float, Iterator[tuple[str, Tensor]]]]:
    """Train; after each step (number, loss, gradient norm, gradients), gradients only of the first
    and the last step and empty otherwise. They must be read to the end, by all ranks.

    `second_step` is entered around the second step: the first one also makes acquaintances.
    """
    steps = resolved.run.train.steps
    beta: float = resolved.deepspeed["optimizer"].get("params", {}).get("betas", [0.9])[0]
    before: dict[str, Tensor] = {}
    for step in range(1, steps + 1):
        with second_step if step == 2 else _NOTHING:
            result = engine.train_batch(micro_batches(resolved, rank, step - 1))
        gradients: Iterator[tuple[str, Tensor]] = iter(())
        if step in (1, steps):
            gradients = _gradients(engine, before, beta)
        yield step, result.loss, result.grad_norm, gradients
        if step == steps - 1:
            before = {name: m.clone() for name, m in _moments(engine)}


def _moments(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    return ((name, m.float().cpu()) for name, m in engine.first_moments())


def _gradients(
    engine: Engine, before: dict[str, Tensor], beta: float
) -> Iterator[tuple[str, Tensor]]:
    for name, moment in _moments(engine):
        yield name, (moment - beta * before.get(name, torch.zeros(()))) / (1 - beta)


def trace(engine: Engine, resolved: Resolved) -> Trace:
    """The oracle's trace, in one process."""
    found = Trace()
    for step, loss, norm, gradients in follow(engine, resolved, rank=0):
        found.losses.append(loss)
        found.norms.append(norm)
        whole = {name: gradient.clone() for name, gradient in gradients}
        if whole:
            found.gradients[step] = whole
    return found


def compare(
    engine: Engine,
    resolved: Resolved,
    rank: int,
    oracle: Trace,
    bounds: Bounds,
    second_step: AbstractContextManager[object] = _NOTHING,
) -> Verdict:
    """Train the same steps in a layout, and say how far it is from the oracle.

    All ranks call this; those that have an empty oracle only take part.
    """
    verdict = Verdict()
    for step, loss, norm, gradients in follow(engine, resolved, rank, second_step):
        if not oracle.losses:
            deque(gradients, maxlen=0)
            continue
        # in the order of cause: a gradient is wrong before the norm of all of them is
        verdict.add("loss", "", step, _apart(loss, oracle.losses[step - 1]), bounds)
        for name, gradient in gradients:
            away = _away(gradient, oracle.gradients[step][name])
            verdict.add("gradient", name, step, away, bounds)
        verdict.add("norm", "", step, _apart(norm, oracle.norms[step - 1]), bounds)
    return verdict


def _apart(a: float, b: float) -> float:
    difference = abs(a - b) / abs(b)
    return math.inf if math.isnan(difference) else difference


def _away(a: Tensor, b: Tensor) -> float:
    norm = torch.linalg.vector_norm(b, dtype=torch.float64)
    distance = torch.linalg.vector_norm(a - b, dtype=torch.float64)
    if float(norm) == 0 == float(distance):
        return 0.0
    return math.inf if bool(distance.isnan()) else float(distance / norm)
