"""95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

Z = 1.959964
"""Standard deviations on each side of a normal distribution's mean that hold 95 %."""


class Estimate(NamedTuple):
    """A value with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Estimate:
        """Apply an increasing function to all three."""
        return Estimate(*map(function, self))

    def to_json(self) -> dict[str, float | None]:
        """The three values by name; JSON has no infinity and no NaN: None."""
        return {k: x if math.isfinite(x) else None for k, x in self._asdict().items()}

    def __str__(self) -> str:
        return f"{self.value:.4f} (95 %: {self.low:.4f} - {self.high:.4f})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Return sum(numerators) / sum(denominators), none negative, over independent samples.

    The interval is that of a ratio estimator (Cochran 1977, section 6.4): the samples vary, the
    tokens within one depend on each other. Without limits for fewer than two samples.
    """
    n, total = len(numerators), math.fsum(denominators)
    value = math.fsum(numerators) / total
    if n < 2:
        return Estimate(value, -math.inf, math.inf)
    pairs = zip(numerators, denominators, strict=True)
    squares = math.fsum((x - value * y) ** 2 for x, y in pairs)
    half = Z * math.sqrt(n / (n - 1) * squares) / total
    return Estimate(value, max(0.0, value - half), value + half)


def share(successes: int, n: int) -> Estimate:
    """Return successes / n with Wilson's interval (1927), which stays between 0 and 1."""
    p, z2 = successes / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = middle - half, middle + half
    return Estimate(p, low if successes else 0.0, high if successes < n else 1.0)
