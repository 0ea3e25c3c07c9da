"""Prints as JSON how far the Triton kernel is from its slow twin.

`test_dropout_attention.py` runs it with TRITON_INTERPRET=1, which must be set before Triton is
imported.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch

from fgpt.model.attention import reference_attention, sdpa_attention
from fgpt.model.kernels.dropout_attention import dropout_attention
from fgpt.model.mask import AttentionMask
from tests.model.test_blocked_attention import dropout, inputs


class Case(NamedTuple):
    """A call; with these widths a tile has 64 tokens."""

    heads: int
    groups: int
    tokens: int
    width: int
    window: int | None = None
    with_documents: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "several tiles": Case(4, 2, 130, 16),
    "one tile, width not a power of 2": Case(1, 1, 3, 24),
    "whole tiles": Case(1, 1, 128, 64),
    "window": Case(2, 2, 200, 16, window=37),
    "documents": Case(2, 1, 200, 16, with_documents=True),
    "window and documents": Case(2, 2, 150, 16, window=50, with_documents=True),
    # the interpreter does not multiply bfloat16
    "float16": Case(2, 1, 100, 16, dtype=torch.float16),
}


def errors(case: Case) -> list[float]:
    """Of the output and the gradients of q, k and v, relative to their norms."""
    parts, grad = inputs(case.heads, case.groups, case.tokens, width=case.width, dtype=case.dtype)
    begins, column = None, torch.arange(case.tokens)
    if case.with_documents:
        begins = torch.stack((column // 70 * 70, (column >= 7).long() * 7))
    mask = AttentionMask(begins, case.window)
    found = results(dropout_attention, parts, grad, mask)
    exact = results(reference_attention, [p.double() for p in parts], grad.double(), mask)
    return [
        float((mine.double() - other).norm() / other.norm())
        for mine, other in zip(found, exact, strict=True)
    ]


def results(function: Any, parts: list[Any], grad: torch.Tensor, mask: AttentionMask) -> list[Any]:
    """Output and gradients."""
    leaves = [part.detach().requires_grad_() for part in parts]
    y = function(*leaves, mask, dropout())
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def seam() -> dict[str, Any]:
    """Let `sdpa_attention` use the kernel: its error, and the size of the largest tensor that it
    saves, relative to q.
    """
    parts, _ = inputs(2, 1, 70, width=16)
    wanted = sdpa_attention(*parts, AttentionMask(), dropout())
    drop = dropout()
    drop.attention = dropout_attention
    leaves = [part.detach().requires_grad_() for part in parts]
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = sdpa_attention(*leaves, AttentionMask(), drop)
    error = float((found - wanted).abs().max())
    return {"error": error, "kernel": found.grad_fn.name(), "saved": max(sizes) / parts[0].numel()}


if __name__ == "__main__":
    print(json.dumps({"errors": {n: errors(c) for n, c in CASES.items()}, "seam": seam()}))
