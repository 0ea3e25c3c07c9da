"""The run file's `speed`, told to the model from outside, whatever the engine."""

from __future__ import annotations

import torch
from torch import nn

from fgpt.config.resolve import Resolved
from fgpt.config.speed import compiles_blocks, fuses_loss
from fgpt.model.embedding import Head
from fgpt.model.gpt import GPT
from fgpt.model.linear import Linear, onednn_linear
from fgpt.model.processor import prefers_onednn
from fgpt.parallel.layers import RowLinear


def apply_speed(model: GPT, resolved: Resolved) -> None:
    """Have `model`, already parallelised, compute as `resolved.run.speed` says."""
    run = resolved.run
    model.head.fused = fuses_loss(run)
    if run.speed.matmul == "auto" and resolved.device == "cpu" and prefers_onednn():
        use_onednn(model)
    if compiles_blocks(run, resolved.zero_stage, resolved.device):
        mode = "reduce-overhead" if run.speed.cuda_graphs else None
        model.compile_blocks(mode)


def use_onednn(model: nn.Module) -> None:
    """Have every projection of the model multiply through oneDNN (in float32, on a CPU)."""
    for module in model.modules():
        if isinstance(module, Linear | Head | RowLinear):
            module.project = onednn_linear


def prefer_fast_attention(device: torch.device) -> None:
    """On Hopper have torch attend with cuDNN, not FlashAttention-2, in 16 bits. Process-wide.

    Torch prefers flash; its `sdpa_kernel` context does not reach into compiled blocks, this does.
    What cuDNN does not take goes to the memory-efficient kernel.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        torch.backends.cuda.enable_flash_sdp(False)
