"""The compiled loss of a chunk, on a CPU, against the formula in float64 and its eager twin."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from fgpt.model.kernels.compiled_chunk_loss import compile_chunk_loss, one_pass_chunk_loss
from fgpt.model.kernels.fused_head_loss import ChunkLoss, eager_chunk_loss, fused_head_loss
from tests.model.test_fused_head_loss import inputs, results, unfused

CPU = torch.device("cpu")
OPTIONS = {
    "plain": (None, 0.0),
    "z-loss": (None, 0.3),
    "soft-cap": (2.0, 0.0),
    "both": (2.0, 0.3),
}
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def chunk(dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = (spread * torch.randn(29, 97, generator=generator)).to(dtype)
    return logits, torch.randint(97, (29, 1), generator=generator)


def by_formula(
    logits: Tensor, targets: Tensor, cap: float | None, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Losses, and gradients by autograd of losses + z_loss log_sum^2, float64."""
    leaf = logits.double().requires_grad_()
    scores = leaf if cap is None else cap * torch.tanh(leaf / cap)
    log_sums = scores.logsumexp(1, keepdim=True)
    losses = log_sums - scores.gather(1, targets)
    (gradients,) = torch.autograd.grad((losses + z_loss * log_sums.square()).sum(), leaf)
    return losses.detach(), gradients


def check(loss: ChunkLoss, dtype: torch.dtype, spread: float = 3.0) -> None:
    logits, targets = chunk(dtype, spread)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for cap, z_loss in OPTIONS.values():
        wanted_losses, wanted = by_formula(logits, targets, cap, z_loss)
        gradients = torch.full_like(logits, torch.nan)
        losses = loss(logits.clone(), targets, gradients, cap, z_loss)
        assert losses.dtype == torch.float32 and losses.shape == (29, 1)
        torch.testing.assert_close(losses.double(), wanted_losses, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(gradients.double(), wanted, rtol=rounding, atol=1e-6)
        assert torch.equal(loss(logits.clone(), targets, None, cap, z_loss), losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [one_pass_chunk_loss, eager_chunk_loss])
def test_both_are_the_formula(loss: ChunkLoss, dtype: torch.dtype) -> None:
    check(loss, dtype)


def test_very_unlikely_targets_have_finite_losses() -> None:
    """Probabilities that float32 cannot hold."""
    check(one_pass_chunk_loss, torch.float32, spread=200.0)


@needs_compiler
def test_the_compiled_loss_trains_as_the_unfused_pair() -> None:
    """In whole chunks and a shorter last one; evaluation, too."""
    loss = compile_chunk_loss(40, 97, torch.float32, CPU)
    assert loss is not None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fgpt.model.kernels.fused_head_loss.LOGITS_PER_CHUNK", {"cpu": 97 * 40})
        pair = inputs()  # 135 tokens

        def compiled(*arguments: Any) -> Tensor:
            return fused_head_loss(*arguments, chunk_loss=loss)

        slow, fast = (results(f, *pair, 0.25) for f in (unfused, compiled))
        for expected, actual in zip(slow, fast, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*pair), slow[0])


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_compiled_loss_is_the_formula(dtype: torch.dtype) -> None:
    check(torch.compile(one_pass_chunk_loss), dtype)


def wrong_values(logits: Tensor, targets: Tensor, gradients: Tensor, *options: Any) -> Tensor:
    losses = eager_chunk_loss(logits, targets, gradients, *options)
    gradients[3, 5] += 0.1
    return losses


def not_a_number(logits: Tensor, targets: Tensor, gradients: Tensor, *options: Any) -> Tensor:
    return eager_chunk_loss(logits, targets, gradients, *options) * torch.nan


def no_compiler(*_: Any) -> Tensor:
    raise RuntimeError("cc1plus: not found\nand more")


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (wrong_values, r"the compiled one differs by \d\.\de-01 of the largest value"),
        (not_a_number, "the compiled one differs by nan of the largest value"),
        (no_compiler, "RuntimeError: cc1plus: not found$"),
    ],
)
def test_a_compiler_that_fails_is_replaced(
    loss: ChunkLoss, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: loss)
    with pytest.warns(UserWarning, match=f"the head's loss takes a slower path: {line}"):
        assert compile_chunk_loss(29, 97, torch.float32, CPU) is None
