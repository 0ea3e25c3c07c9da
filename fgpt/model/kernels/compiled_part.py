"""A part of the model that torch.compile fuses into one kernel, tried before it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Part = Callable[..., Any]


def compile_part(
    part: Part,
    twin: Part,
    outputs: Callable[[Part], Sequence[Tensor]],
    tolerance: float,
    what: str,
) -> Part | None:
    """Return the compiled `part`, or None, with a warning that names `what`, where the compiler
    fails or what it makes differs from the slow `twin`.

    `outputs` calls either on random input and returns tensors; none may differ by more than
    `tolerance` times the largest value of the twin's. Call it before training, with the shapes of
    training: so the compiler runs here, and not in the first step.
    """
    compiled: Part = torch.compile(part)
    reason = ""
    try:
        pairs = zip(outputs(compiled), outputs(twin), strict=True)
        errors = [largest_difference(a, b) / float(b.abs().max()) for a, b in pairs]
        wrong = [error for error in errors if not error <= tolerance]  # NaN, too
        if wrong:
            reason = f"the compiled one differs by {wrong[0]:.1e} of the largest value"
    except Exception as error:  # the compiler's are of any kind
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if not reason:
        return compiled
    warnings.warn(f"{what} takes a slower path: {reason}", stacklevel=3)
    return None


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Of two tensors of one shape, NaN if one has a NaN."""
    return float((a.float() - b.float()).abs().max())
