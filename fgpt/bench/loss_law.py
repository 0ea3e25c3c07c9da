"""The law loss = E + A / N^a + B / D^b, fitted to finished runs.

N: parameters, D: training tokens. As Hoffmann et al. 2022 (approach 3): the Huber loss of the
logarithms, minimized with L-BFGS from many starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from fgpt.errors import UserError

MIN_RUNS = 6
"""One more than the law has constants."""
HIGHEST_EXPONENT = 5.0
"""Runs that ask for more follow another law: published exponents are below 1."""
MIN_LEVELS = 3
"""Sizes, and token counts, that it takes to tell E from a power of N, and from one of D."""
HUBER_DELTA = 0.01
"""Relative error of a loss from which on it counts linearly. About the noise of short runs; the
paper, which fits hundreds of long ones, takes 0.001."""
EXPONENTS = torch.arange(0.05, 1.6, 0.05, dtype=torch.float64)
"""The starts' a and b."""
POLISHED = 3
"""Starts from which L-BFGS runs: the best of the grid."""


class Run(NamedTuple):
    """A finished run."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class LossLaw:
    """loss = E + A / N^a + B / D^b, in nats per token."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def predict(self, parameters: float, tokens: float) -> float:
        """The loss of a run with so many parameters and training tokens."""
        return self.E + self.A / parameters**self.a + self.B / tokens**self.b


def fit(runs: Sequence[Run]) -> LossLaw:
    """The law that fits these runs. Raises UserError if they cannot determine it."""
    if (why := undetermined(runs)) is not None:
        raise UserError(f"loss = E + A/N^a + B/D^b has five constants: {why}")
    # 1. logarithms, centred: exponents and factors then hardly depend on each other
    values = torch.tensor(runs, dtype=torch.float64)
    log_n, log_d, log_loss = values.log().unbind(1)
    centre_n, centre_d = float(log_n.mean()), float(log_d.mean())
    sizes, tokens = log_n - centre_n, log_d - centre_d
    # 2. with given exponents the law is linear in E and the two factors: solve it on a grid
    starts = _grid(sizes, tokens, log_loss)
    # 3. the best of these, all five constants free
    found = [_polish(start, sizes, tokens, log_loss) for start in starts]
    best = min(found, key=lambda each: each[1])[0]
    log_e, log_a, a, log_b, b = best.tolist()
    if not max(abs(a), abs(b)) <= HIGHEST_EXPONENT:
        raise UserError(
            f"the losses of {len(runs)} runs follow no law E + A/N^a + B/D^b: its exponents grow"
            f" to {a:.3g} and {b:.3g} -> take longer runs (--minutes) or a lower learning rate"
        )
    factors = math.exp(log_a + a * centre_n), math.exp(log_b + b * centre_d)
    return LossLaw(math.exp(log_e), factors[0], a, factors[1], b)


def refits(runs: Sequence[Run]) -> list[LossLaw]:
    """The laws of all runs but one, for each of them that the others suffice without.

    Their range shows how much the law depends on single runs; it is no confidence interval. Raises
    UserError if there are none.
    """
    laws = []
    for i in range(len(runs)):
        with suppress(UserError):
            laws.append(fit([*runs[:i], *runs[i + 1 :]]))
    if not laws:
        raise UserError(f"{len(runs)} runs determine a law, but no fewer: its error is not known")
    return laws


def spread(laws: Sequence[LossLaw]) -> dict[str, tuple[float, float]]:
    """Constant -> its lowest and highest value."""
    columns = zip(*map(astuple, laws), strict=True)
    return {
        name: (min(c), max(c))
        for name, c in zip(LossLaw.__dataclass_fields__, columns, strict=False)
    }


def undetermined(runs: Sequence[Run]) -> str | None:
    """Why these runs cannot determine the law; None: they can."""
    if len(runs) < MIN_RUNS:
        return f"{len(runs)} runs do not determine them; it takes {MIN_RUNS}"
    for name, levels in (
        ("sizes", {run.parameters for run in runs}),
        ("token counts", {run.tokens for run in runs}),
    ):
        if len(levels) < MIN_LEVELS:
            return f"runs of {len(levels)} {name} do not determine them; it takes {MIN_LEVELS}"
    if bad := [run for run in runs if not all(0 < value < math.inf for value in run)]:
        n, d, loss = bad[0]
        return f"a run with {n:g} parameters, {d:g} tokens and loss {loss:g} has no logarithm"
    return None


def _grid(sizes: Tensor, tokens: Tensor, log_loss: Tensor) -> list[Tensor]:
    """The POLISHED best starts, each [5]: log E, log A, a, log B, b of centred logarithms."""
    a, b = (grid.flatten() for grid in torch.meshgrid(EXPONENTS, EXPONENTS, indexing="ij"))
    columns = [
        torch.ones(len(a), len(sizes), dtype=torch.float64),
        (-a[:, None] * sizes).exp(),
        (-b[:, None] * tokens).exp(),
    ]
    loss = log_loss.exp()
    relative = torch.stack(columns, dim=2) / loss[:, None]  # [starts, runs, 3]
    target = torch.ones(len(a), len(sizes), 1, dtype=torch.float64)
    solved = torch.linalg.lstsq(relative, target).solution[..., 0]  # [starts, 3]
    e, factor_a, factor_b = solved.clamp_min(1e-3 * float(loss.min())).log().unbind(1)
    starts = torch.stack([e, factor_a, a, factor_b, b], dim=1)
    best = _cost(starts, sizes, tokens, log_loss).argsort()[:POLISHED]
    return list(starts[best])


def _polish(start: Tensor, sizes: Tensor, tokens: Tensor, log_loss: Tensor) -> tuple[Tensor, float]:
    """L-BFGS from this start: constants [5] and their cost."""
    constants = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [constants],
        max_iter=200,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-11,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        cost = _cost(constants, sizes, tokens, log_loss)
        cost.backward()
        return cost

    optimizer.step(closure)
    cost = float(_cost(constants.detach(), sizes, tokens, log_loss))
    return constants.detach(), cost if math.isfinite(cost) else math.inf


def _cost(constants: Tensor, sizes: Tensor, tokens: Tensor, log_loss: Tensor) -> Tensor:
    """Huber loss [...] of the relative errors, in units of HUBER_DELTA; `constants`: [..., 5]."""
    log_e, log_a, a, log_b, b = constants[..., None].unbind(-2)
    terms = torch.stack([log_e + 0 * sizes, log_a - a * sizes, log_b - b * tokens])
    errors = (terms.logsumexp(0) - log_loss) / HUBER_DELTA
    return huber_loss(errors, torch.zeros_like(errors), reduction="none").sum(-1)
