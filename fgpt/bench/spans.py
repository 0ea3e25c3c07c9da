"""What kernels do, by their names, and how their times add up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

KINDS = (
    "matrix products",
    "attention",
    "optimizer",
    "communication",
    "element-wise",
)
# the first pattern that is found in a kernel's or operator's name decides
_PATTERNS = (
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|broadcast_"),
    ("attention", r"flash|fmha|attention|sdpa|cudnn.*(fprop|bprop)|::_(safe_)?softmax"),
    ("optimizer", r"adam|multi_tensor|foreach|FusedOptimizer"),
    ("matrix products", r"gemm|matmul|cublas|cutlass|nvjet|wgmma|\bmm\b|bmm|addmm|mkldnn|linear"),
)


class Span(NamedTuple):
    """A kernel or operator that ran."""

    name: str
    begin: float
    """Seconds."""
    end: float
    """Seconds."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return kind_of(self.name)


def kind_of(name: str) -> str:
    """What a kernel or operator of this name does; what is nothing else is element-wise."""
    for kind, pattern in _PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "element-wise"


def union(spans: Sequence[Span]) -> float:
    """Seconds in which at least one of them ran."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        total += max(0.0, span.end - max(span.begin, reached))
        reached = max(reached, span.end)
    return total


def alone(spans: Sequence[Span], others: Sequence[Span]) -> float:
    """Seconds in which one of `spans` ran and none of `others`."""
    return union([*spans, *others]) - union(others)


def shares_of(work: Iterable[tuple[str, float]], busy_s: float, total_s: float) -> dict[str, float]:
    """Kind -> its share of `total_s`, from (name, seconds) of kernels or operators; and "idle".

    `busy_s`: seconds in which any of them ran.
    """
    seconds = dict.fromkeys(KINDS, 0.0)
    for name, own_s in work:
        seconds[kind_of(name)] += own_s
    shares = {kind: value / total_s for kind, value in seconds.items()}
    return {**shares, "idle": max(0.0, 1 - busy_s / total_s)}
