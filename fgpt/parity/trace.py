"""What a few steps of training leave behind, and how far two such traces are apart.

The gradient of a step is read where every engine has it, whole and used: out of Adam's first
moment, m_k = b1 m_{k-1} + (1 - b1) g_k. It is the averaged gradient that the optimizer was given,
so that a lost reduction and a wrong scale show in it; clipping by the reported norm is undone, so
that an error in one place is not spread over all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fgpt.config.resolve import Resolved
from fgpt.data.loader import MicroBatch
from fgpt.distributed.agreements import gather_json
from fgpt.engine.base import Engine
from fgpt.engine.deepspeed.zero_engine import ZeroEngine
from fgpt.parallel.topology import Grid


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences that count as the same run."""

    loss: float
    norm: float
    gradient: float
    """Of one tensor: |a - b| / |b| in the L2 norm."""
    copies: float = 0.0
    """Ranks that hold the same must hold the very same."""


_NOTHING = nullcontext()
BOUNDS = {"fp32": Bounds(1e-5, 1e-4, 1e-4), "bf16": Bounds(5e-4, 1e-2, 8e-2)}


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
    copies: float = 0.0
    """Of a tensor that each tensor rank holds: between ranks, absolute, in Adam's first moment."""
    departures: dict[str, str] = field(default_factory=dict)
    """loss, gradient, norm -> where that first was beyond its bound; none: it is the same run."""

    @property
    def departs(self) -> str | None:
        """All departures in one line."""
        return "; ".join(self.departures.values()) or None

    def add(self, kind: str, step: int, differences: Mapping[str, float], bounds: Bounds) -> None:
        """Take one step's differences into account: by parameter for gradients, else of ''.

        Of several parameters the last in the model's order is named: gradients come from there, so
        it is the first one that is wrong.
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
    """This rank's part of a global batch that is the same in every layout.

    Ids are drawn with falling frequency, so that there is something to learn; documents, where the
    run tells them apart, are about an eighth of a sample long.
    """
    run, batch = resolved.run, resolved.batch
    data = Grid.of(batch).coordinates(rank).data
    generator = torch.Generator().manual_seed(step)
    uniform = torch.rand(batch.global_size, resolved.seq_len + 1, generator=generator)
    ids = (run.model.vocab_size * uniform**4).long()
    begins = positions = None
    if run.data.document_mask:
        column = torch.arange(resolved.seq_len)
        first = torch.rand(batch.global_size, resolved.seq_len, generator=generator) < 8 / len(
            column
        )
        begins = (first * column).cummax(dim=1).values
        positions = column - begins if run.data.reset_positions else None
    rows = (ids[:, :-1], ids[:, 1:], begins, positions)
    grid = (batch.accumulation, batch.dp, batch.micro)
    mine = [[None] * grid[0] if x is None else x.unflatten(0, grid)[:, data] for x in rows]
    return [MicroBatch(*four) for four in zip(*mine, strict=True)]


def follow(
    engine: Engine,
    resolved: Resolved,
    rank: int,
    steps: int,
    second_step: AbstractContextManager[object] = _NOTHING,
) -> Iterator[tuple[int, float, float, Iterator[tuple[str, Tensor]]]]:
    """Train; after each step (number, loss, gradient norm, gradients), gradients only of the first
    and the last step and empty otherwise. They must be read to the end, by all ranks.

    `second_step` is entered around the second step: the first one also makes acquaintances.
    """
    beta: float = resolved.deepspeed["optimizer"].get("params", {}).get("betas", [0.9])[0]
    clip: float = resolved.deepspeed["gradient_clipping"]
    before: dict[str, Tensor] = {}
    for step in range(1, steps + 1):
        with second_step if step == 2 else _NOTHING:
            result = engine.train_batch(micro_batches(resolved, rank, step - 1)).result()
        gradients: Iterator[tuple[str, Tensor]] = iter(())
        if step in (1, steps):
            clipped = max(1.0, (result.grad_norm + 1e-6) / clip) if clip > 0 else 1.0
            gradients = _gradients(engine, before, beta, clipped)
        yield step, result.loss, result.grad_norm, gradients
        if step == steps - 1:
            before = {name: m.clone() for name, m in _moments(engine)}


def _moments(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    return ((name, m.float().cpu()) for name, m in engine.first_moments())


def _gradients(
    engine: Engine, before: dict[str, Tensor], beta: float, clipped: float
) -> Iterator[tuple[str, Tensor]]:
    for name, moment in _moments(engine):
        part = moment - beta * before[name] if name in before else moment
        yield name, part * (clipped / (1 - beta))


def trace(engine: Engine, resolved: Resolved, steps: int) -> Trace:
    """The oracle's trace, in one process."""
    found = Trace()
    for step, loss, norm, gradients in follow(engine, resolved, 0, steps):
        found.losses.append(loss)
        found.norms.append(norm)
        whole = {name: gradient.clone() for name, gradient in gradients}
        if whole:
            found.gradients[step] = whole
    return found


def compare(
    engine: ZeroEngine,
    resolved: Resolved,
    rank: int,
    steps: int,
    oracle: Trace,
    bounds: Bounds,
    second_step: AbstractContextManager[object] = _NOTHING,
) -> Verdict:
    """Train the same steps in a layout, and say how far it is from the oracle.

    All ranks call this; those that have an empty oracle only take part.
    """
    verdict = Verdict()
    for step, loss, norm, gradients in follow(engine, resolved, rank, steps, second_step):
        if not oracle.losses:
            deque(gradients, maxlen=0)
            continue
        verdict.add("loss", step, {"": _apart(loss, oracle.losses[step - 1])}, bounds)
        away = {name: _away(g, oracle.gradients[step][name]) for name, g in gradients}
        verdict.add("gradient", step, away, bounds)
        verdict.add("norm", step, {"": _apart(norm, oracle.norms[step - 1])}, bounds)
    copies = {
        name: apart
        for stage in gather_json(engine.max_copy_differences(), engine.deepspeed.device)
        for name, apart in stage.items()
    }
    verdict.add("copies", steps, copies, bounds)
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
