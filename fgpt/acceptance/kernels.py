"""The attention kernels and the head's loss against their slow twins, values and gradients.

B batch, T tokens, K d_head, H query heads, G key/value heads.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fgpt.acceptance.check import Findings
from fgpt.engine.base import DTYPES
from fgpt.model.attention import reference_attention, sdpa_attention
from fgpt.model.context import BatchContext, ForwardContext
from fgpt.model.dropout import Dropout
from fgpt.model.kernels.compiled_chunk_loss import compile_chunk_loss
from fgpt.model.kernels.compiled_part import largest_difference
from fgpt.model.kernels.fused_head_loss import ChunkLoss, chunk_size, eager_chunk_loss
from fgpt.model.mask import AttentionMask

BACKENDS = {
    "flash attention": SDPBackend.FLASH_ATTENTION,
    "cuDNN attention": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient attention": SDPBackend.EFFICIENT_ATTENTION,
}
ROWS = 64
"""Tokens of which the head's losses are compared."""
FP32_BOUND = 2e-5
"""Relative error against float64 in float32, where the reference's own is smaller."""


def check_attention(found: Findings) -> None:
    """Each of torch's kernels by itself, and the one that is chosen; with and without GQA."""
    mask = AttentionMask()
    for precision in ("fp32", "bf16", "fp16") if found.on_gpu else ("fp32", "bf16"):
        for groups in (8, 2):
            name = f"{precision}, 8 heads on {groups}"
            _compare(found, f"chosen kernel, {name}", mask, precision, groups)
            for backend_name, backend in BACKENDS.items() if precision != "fp32" else ():
                part = f"{backend_name}, {name}"
                if backend == SDPBackend.EFFICIENT_ATTENTION and groups < 8:
                    continue  # it has no GQA
                if found.on_gpu:
                    _compare(found, part, mask, precision, groups, forced=backend)
                else:
                    found.skip(part)


def check_masks(found: Findings) -> None:
    """Documents, windows, and both, as the blocks of a model meet them."""
    column = torch.arange(256)
    begins = torch.stack((column // 100 * 100, (column >= 7).long() * 7))
    masks = {
        "documents": AttentionMask(begins),
        "window of 37": AttentionMask(window=37),
        "documents and window of 37": AttentionMask(begins, 37),
    }
    for precision in ("fp32", "bf16"):
        for name, mask in masks.items():
            for groups in (8, 2):
                part = f"{name}, {precision}, 8 heads on {groups}"
                _compare(found, part, mask, precision, groups)


def check_dropout(found: Findings) -> None:
    """Attention with dropout: on a GPU the Triton kernel, elsewhere attention by blocks."""
    kernel: Callable[..., Tensor] | None = None
    if not found.on_gpu:
        found.skip("the Triton kernel")
    elif importlib.util.find_spec("triton") is None:
        found.require(False, "triton is not installed: pip install triton")
    else:
        from fgpt.model.kernels.dropout_attention import dropout_attention

        kernel = dropout_attention
    column = torch.arange(256)
    begins = torch.stack((column // 100 * 100, (column >= 7).long() * 7))
    masks = {"causal": AttentionMask(), "documents and window": AttentionMask(begins, 37)}
    for precision in ("fp32", "bf16"):
        for name, mask in masks.items():
            dropout = _dropout(kernel)
            _compare(found, f"{name}, {precision}", mask, precision, 2, dropout=dropout)


def _dropout(kernel: Callable[..., Tensor] | None) -> Dropout:
    context = ForwardContext()
    context.current = BatchContext(seed=1, step=2, first_sample=3)
    dropout = Dropout(0.2, 0, context)
    dropout.attention = kernel
    return dropout


def _compare(
    found: Findings,
    part: str,
    mask: AttentionMask,
    precision: str,
    groups: int,
    *,
    forced: SDPBackend | None = None,
    dropout: Dropout | None = None,
) -> None:
    """Record the largest relative error of output and gradients, against float64 on the CPU.

    It must be at most twice that of `reference_attention` in the same precision on the same device.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, heads, 256, 64) for heads in (8, groups, groups, 8)]
    parts = [torch.randn(shape, generator=generator).to(DTYPES[precision]) for shape in shapes]
    here = [x.to(found.device) for x in parts]
    only = nullcontext() if forced is None else sdpa_kernel([forced])
    try:
        mine = _results(sdpa_attention, here, mask, dropout, only)
    except RuntimeError as error:
        if forced != SDPBackend.CUDNN_ATTENTION:
            raise
        found.skip(part, f"not run: {str(error).splitlines()[0]}")  # not on every GPU
        return
    exact = _results(reference_attention, [x.double() for x in parts], mask, dropout)
    slow = _results(reference_attention, here, mask, dropout)
    own = 2 * _relative_error(slow, exact)
    departure = _relative_error(mine, exact)
    found.figure(part, departure, "relative error", at_most=max(own, FP32_BOUND))


def _results(
    function: Callable[..., Tensor],
    parts: Sequence[Tensor],
    mask: AttentionMask,
    dropout: Dropout | None,
    only: AbstractContextManager[Any] | None = None,
) -> list[Tensor]:
    """Output, and gradients of q, k, v."""
    *leaves, grad = parts
    leaves = [x.detach().requires_grad_() for x in leaves]
    fresh = AttentionMask(mask.document_begins, mask.window)  # masks keep tensors of one device
    with only or nullcontext():
        y = function(*leaves, fresh, dropout)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest of the tensors' errors relative to their norms; NaN if one has a NaN."""
    errors = [
        (mine.cpu().double() - true.double()).norm() / true.double().norm()
        for mine, true in zip(found, exact, strict=True)
    ]
    return float(torch.stack(errors).max())


def check_head_loss(found: Findings) -> None:
    """Losses and gradients in three forms, and the time of a chunk of GPT-2's vocabulary."""
    vocab_size = 50304 if found.on_gpu else 4096
    n_tokens = chunk_size(50304, 768, "cuda") if found.on_gpu else 256
    options = {"plain": (None, 0.0), "cap and z-loss": (30.0, 1e-3)}
    cases = [("fp32", "plain"), ("bf16", "cap and z-loss")]  # on a CPU each takes the compiler 10 s
    if found.on_gpu:
        cases += [("fp32", "cap and z-loss"), ("bf16", "plain")]
    for precision, name in cases:
        part, (softcap, z_loss) = f"{precision}, {name}", options[name]
        torch.compiler.reset()  # each compiled for its own numbers, as a training run does
        compiled = compile_chunk_loss(
            ROWS,
            vocab_size,
            DTYPES[precision],
            found.device,
            softcap=softcap,
            z_loss=z_loss,
        )
        found.require(compiled is not None, f"{part}: not compiled; the reason is in the log")
        if compiled is not None:
            _compare_losses(found, part, compiled, vocab_size, precision, softcap, z_loss)
    torch.compiler.reset()
    compiled = compile_chunk_loss(n_tokens, vocab_size, torch.bfloat16, found.device)
    for name, loss in (("compiled", compiled), ("eager", eager_chunk_loss)):
        if loss is not None:
            seconds = _seconds_of_chunk(loss, n_tokens, vocab_size, found.device)
            gbytes = 6 * n_tokens * vocab_size / 1e9
            found.figure(f"{name} chunk of {n_tokens} x {vocab_size}, bf16", 1e3 * seconds, "ms")
            found.figure(f"{name} chunk, needed bytes per second", gbytes / seconds, "GB/s")


def _compare_losses(
    found: Findings,
    part: str,
    loss: ChunkLoss,
    vocab_size: int,
    precision: str,
    softcap: float | None,
    z_loss: float,
) -> None:
    """Against the formula in float64, by autograd."""
    generator = torch.Generator().manual_seed(2)
    logits = (5 * torch.randn(ROWS, vocab_size, generator=generator)).to(DTYPES[precision])
    targets = torch.randint(vocab_size, (ROWS, 1), generator=generator)
    leaf = logits.double().requires_grad_()
    scores = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
    log_sums = scores.logsumexp(1, keepdim=True)
    wanted = log_sums - scores.gather(1, targets)
    (wanted_gradients,) = torch.autograd.grad((wanted + z_loss * log_sums**2).sum(), leaf)
    here = logits.to(found.device)
    gradients = torch.empty_like(here)
    losses = loss(here, targets.to(found.device), gradients, softcap, z_loss)
    found.figure(f"{part}: losses", largest_difference(losses.cpu(), wanted), "nats", at_most=1e-4)
    error = _relative_error([gradients], [wanted_gradients])
    bound = 1e-5 if precision == "fp32" else 4e-3
    found.figure(f"{part}: gradients", error, "relative error", at_most=bound)


def _seconds_of_chunk(
    loss: ChunkLoss, n_tokens: int, vocab_size: int, device: torch.device
) -> float:
    """Seconds of the fastest of five, after one for the compiler."""
    logits = torch.randn(n_tokens, vocab_size, device=device, dtype=torch.bfloat16)
    targets = torch.zeros(n_tokens, 1, device=device, dtype=torch.int64)
    gradients, fastest = torch.empty_like(logits), float("inf")
    for number in range(6):
        t0 = time.perf_counter()
        loss(logits, targets, gradients, None, 0.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number > 0:
            fastest = min(fastest, time.perf_counter() - t0)
    return fastest
