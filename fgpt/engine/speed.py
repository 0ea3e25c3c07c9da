"""Applies the run file's `speed` to the model."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from fgpt.config.resolve import Resolved
from fgpt.config.schema import Shapes
from fgpt.config.speed import compiles_blocks, fuses_loss
from fgpt.engine.base import DTYPES
from fgpt.errors import LaunchError
from fgpt.model.attention import Attention
from fgpt.model.cpu_features import prefers_onednn
from fgpt.model.dropout import Dropout
from fgpt.model.embedding import Head
from fgpt.model.gpt import GPT
from fgpt.model.kernels.fused_head_loss import chunk_size
from fgpt.model.linear import Linear, onednn_linear
from fgpt.parallel.tensor.layers import RowParallelLinear
from fgpt.utils.compiler import missing_compiler

FP8_CAPABILITY = (8, 9)
"""Lowest compute capability with fp8 matrix products."""


def apply_speed(model: GPT, resolved: Resolved) -> None:
    """Apply `resolved.run.speed` to a model that is already parallelized.

    Without a compiler (`lost_without_compiler`) blocks and the loss stay eager, and dropout has no
    kernel.
    """
    run = resolved.run
    can_compile = missing_compiler(resolved.device) is None
    model.head.fused = fuses_loss(run, resolved.precision)
    compiles_parts = can_compile and resolved.device == "cuda" and run.speed.compile != "off"
    if model.head.fused and compiles_parts:
        use_compiled_loss(model, resolved)
    if run.speed.matmul == "auto" and resolved.device == "cpu" and prefers_onednn():
        use_onednn(model)
    if run.speed.matmul == "fp8":
        use_fp8(model, resolved.device)
    if run.model.dropout > 0 and resolved.device == "cuda" and can_compile:
        use_dropout_attention(model, DTYPES[resolved.precision])
        # cheap recomputation sees the operators of a block, of which compiled code has none
        if compiles_parts and run.speed.recompute != "cheap":
            use_compiled_dropout(model, resolved)
    if compiles_blocks(run, resolved.zero_stage, resolved.device) and can_compile:
        mode = "reduce-overhead" if run.speed.cuda_graphs else None
        model.compile_blocks(mode)


def lost_without_compiler(resolved: Resolved) -> str | None:
    """What this rank does more slowly because its machine cannot compile code; None: nothing."""
    if compiles_blocks(resolved.run, resolved.zero_stage, resolved.device):
        feature = "compiled blocks"
    elif resolved.run.model.dropout > 0 and resolved.device == "cuda":
        feature = "Triton's attention with dropout"
    elif fuses_loss(resolved.run, resolved.precision) and resolved.device == "cuda":
        feature = "the compiled loss"
    else:
        return None
    missing = missing_compiler(resolved.device)
    return missing and f"{feature}: off because of {missing}"


def use_onednn(model: nn.Module) -> None:
    """Make every projection of the model use oneDNN (float32, on a CPU)."""
    for module in model.modules():
        if isinstance(module, Linear | Head | RowParallelLinear):
            module.project = onednn_linear


def use_compiled_loss(model: GPT, resolved: Resolved) -> None:
    """Compile what the fused head computes between its products, if that works here."""
    from fgpt.model.kernels.compiled_chunk_loss import compile_chunk_loss

    head, run = model.head, resolved.run
    vocab_size, width = run.model.vocab_size, run.model.d_model
    n_tokens = resolved.batch.micro * resolved.seq_len // run.parallel.cp
    model.head.chunk_loss = compile_chunk_loss(
        min(n_tokens, chunk_size(vocab_size, width, resolved.device)),
        vocab_size,
        DTYPES[resolved.precision],
        torch.device(resolved.device),
        softcap=head.softcap,
        z_loss=head.z_loss,
    )


def use_dropout_attention(model: GPT, dtype: torch.dtype) -> None:
    """Make attention with dropout use the Triton kernel, if it works on this GPU."""
    if importlib.util.find_spec("triton") is None:
        return
    from fgpt.model.kernels.dropout_attention import MAX_D_HEAD, dropout_attention, works_here

    if Shapes.of(model.config).d_head <= MAX_D_HEAD and works_here(dtype):
        for module in model.blocks.modules():
            if isinstance(module, Attention):
                module.dropout.attention = dropout_attention


def use_compiled_dropout(model: GPT, resolved: Resolved) -> None:
    """Compile the dropout of activations, if that works here."""
    from fgpt.model.kernels.compiled_dropout import compile_drop

    run, grid = resolved.run, resolved.run.parallel
    n_tokens = resolved.seq_len // grid.cp // (grid.tp if grid.sequence else 1)
    shape = (resolved.batch.micro, n_tokens, run.model.d_model)
    drop = compile_drop(shape, DTYPES[resolved.precision], torch.device(resolved.device))
    if drop is None:
        return
    for module in model.modules():
        if isinstance(module, Dropout):
            module.drop = drop


def use_fp8(model: GPT, device: str) -> None:
    """Make the blocks' projections use fp8. Raises LaunchError on a GPU without fp8."""
    if device == "cuda" and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        raise LaunchError(
            "speed.matmul fp8 needs a GPU of compute capability 8.9 or more, this one has"
            f" {capability}: write speed.matmul auto"
        )
    from fgpt.model.kernels.fp8_linear import fp8_linear

    for module in model.blocks.modules():
        if isinstance(module, Linear):
            module.project = fp8_linear


def prefer_fast_attention(device: torch.device) -> None:
    """On Hopper make torch try cuDNN's attention before FlashAttention-2, for the whole process.

    Torch's `sdpa_kernel` context has no effect inside compiled blocks. Inputs that cuDNN does not
    support still go to FlashAttention-2.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        cudnn = int(SDPBackend.CUDNN_ATTENTION.value)
        others = [b for b in torch._C._get_sdp_priority_order() if b != cudnn]
        torch._C._set_sdp_priority_order([cudnn, *others])
