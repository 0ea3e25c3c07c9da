"""The run file's `speed`, told to the model from outside, whatever the engine."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from fgpt.config.resolve import Resolved
from fgpt.config.speed import compiles_blocks, fuses_loss
from fgpt.errors import LaunchError
from fgpt.model.cpu_features import prefers_onednn
from fgpt.model.embedding import Head
from fgpt.model.gpt import GPT
from fgpt.model.kernels.fp8_linear import fp8_linear
from fgpt.model.linear import Linear, onednn_linear
from fgpt.parallel.tensor.layers import RowParallelLinear

FP8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply in 8 bits."""


def apply_speed(model: GPT, resolved: Resolved) -> None:
    """Have `model`, already parallelised, compute as `resolved.run.speed` says."""
    run = resolved.run
    model.head.fused = fuses_loss(run, resolved.precision)
    if run.speed.matmul == "auto" and resolved.device == "cpu" and prefers_onednn():
        use_onednn(model)
    if run.speed.matmul == "fp8":
        use_fp8(model, resolved.device)
    if compiles_blocks(run, resolved.zero_stage, resolved.device):
        mode = "reduce-overhead" if run.speed.cuda_graphs else None
        model.compile_blocks(mode)


def use_onednn(model: nn.Module) -> None:
    """Have every projection of the model multiply through oneDNN (in float32, on a CPU)."""
    for module in model.modules():
        if isinstance(module, Linear | Head | RowParallelLinear):
            module.project = onednn_linear


def use_fp8(model: GPT, device: str) -> None:
    """Have the blocks' projections multiply in 8 bits. Raises LaunchError where a GPU cannot."""
    if device == "cuda" and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        here = ".".join(map(str, torch.cuda.get_device_capability()))
        raise LaunchError(
            f"speed.matmul fp8 needs a GPU of compute capability 8.9 or more, this one has {here}:"
            " write speed.matmul auto"
        )
    for module in model.blocks.modules():
        if isinstance(module, Linear):
            module.project = fp8_linear


def prefer_fast_attention(device: torch.device) -> None:
    """On Hopper have torch attend with cuDNN first, in 16 bits. Process-wide.

    Torch's own order is FlashAttention-2 first; its `sdpa_kernel` context does not reach into
    compiled blocks, the order of the process does. What cuDNN does not take goes on to flash.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        cudnn = int(SDPBackend.CUDNN_ATTENTION.value)
        others = [one for one in torch._C._get_sdp_priority_order() if one != cudnn]
        torch._C._set_sdp_priority_order([cudnn, *others])
