"""Orthogonalization by Newton-Schulz iterations (Jordan et al. 2024, Muon).

A matrix U S V^T becomes about U V^T: five iterations of an odd polynomial bring its singular values
into 0.7 to 1.2. The polynomial is steep at 0 instead of exact at 1, which training does not notice.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

NewtonSchulz = Literal["standard", "gram"]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5."""
EPS = 1e-7
_RESTART = 2
"""Iterations of `gram` after which it computes the Gram matrix anew, against rounding errors."""


def orthogonalize(
    matrices: Tensor,
    *,
    steps: int = 5,
    method: NewtonSchulz = "standard",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return the orthogonalized matrices [..., M, N], in `dtype`, in which they are computed.

    A matrix of zeros stays one. Both methods compute the same up to rounding: `standard` multiplies
    the matrix in each iteration, as torch.optim.Muon does; `gram` iterates on X X^T and multiplies
    the matrix twice, which takes fewer operations for long ones and more precision, so it is never
    computed in bfloat16 (Zhang, Amsel, Chen & Dao 2026).
    """
    # 1. as wide as high or wider, and no singular value above 1
    is_high = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.float() if dtype == torch.float16 else matrices.to(dtype)  # its range is small
    x = x.mT if is_high else x
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)).to(dtype)
    # 2. iterate
    is_square = x.shape[-2] == x.shape[-1]
    if method == "standard" or is_square:
        for _ in range(steps):
            x = _iterate(x)
    else:
        x = _iterate_gram(x, steps)
    return x.mT if is_high else x


def _iterate(x: Tensor) -> Tensor:
    """a x + b (x x^T) x + c (x x^T)^2 x."""
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    return _add_product(x, _add_product(gram, gram, gram, b, c), x, a, 1.0)


def _iterate_gram(x: Tensor, steps: int) -> Tensor:
    """The same iterations as products of small matrices: x_k = q x_0 and gram_k = q gram_0 q."""
    a, b, c = COEFFICIENTS
    for begin, end in ((0, min(_RESTART, steps)), (_RESTART, steps)):
        q, gram = None, x @ x.mT
        for step in range(begin, end):
            factor = _add_product(gram, gram, gram, b, c)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            q = factor if q is None else factor @ q
            if step < end - 1:
                gram = factor @ gram @ factor
        x = x if q is None else q @ x
    return x


def _add_product(added: Tensor, x: Tensor, y: Tensor, beta: float, alpha: float) -> Tensor:
    """beta * added + alpha * x @ y."""
    product = torch.baddbmm if x.dim() == 3 else torch.addmm
    return product(added, x, y, beta=beta, alpha=alpha)
