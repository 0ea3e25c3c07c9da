"""Activation checkpointing according to the DeepSpeed JSON's `activation_checkpointing` section.

The section's presence turns it on. Its keys:

    number_checkpoints               number of recomputed segments of blocks; default one per block
    cpu_checkpointing                keep the segments' inputs in host memory (GPU only)
    synchronize_checkpoint_boundary  synchronize the device at each segment
    partition_activations            divide the segments' inputs among tensor-parallel ranks
    contiguous_memory_optimization   ... in one contiguous buffer

With the run file's `speed.recompute` "cheap", torch recomputes only cheap operations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers torch_attn's operators
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from fgpt.config.schema import Recompute
from fgpt.model.gpt import GPT, CheckpointFunction
from fgpt.parallel.topology import Mpu, ProcessGroups

EXPENSIVE = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_mm.default,
        torch.ops.fgpt.onednn_product.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.fgpt.blocked_attention.default,
    }
)
"""Results that "cheap" keeps: products with weights, and fused attention."""


def apply_checkpointing(
    model: GPT, section: dict[str, Any] | None, groups: ProcessGroups | None, recompute: Recompute
) -> None:
    """Make `model` recompute its blocks, unless `section` (activation_checkpointing) is None.

    DeepSpeed recomputes where `groups` are given and `recompute` is "all", otherwise torch.
    """
    if section is None:
        return
    n_segments = section.get("number_checkpoints") or model.config.n_layer
    if recompute == "cheap":
        checkpoint = _selective()
    else:
        checkpoint = _torch() if groups is None else _deepspeed(section, groups)
    model.checkpoint_activations(checkpoint, n_segments)


def _torch() -> CheckpointFunction:
    return lambda run, x: torch_checkpoint(run, x, use_reentrant=False)


def _selective() -> CheckpointFunction:
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return lambda run, x: torch_checkpoint(run, x, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # the Triton kernel's operator exists only where its module has been imported
    expensive = operator in EXPENSIVE or str(operator) == "fgpt.dropout_attention.default"
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


def _deepspeed(section: dict[str, Any], groups: ProcessGroups) -> CheckpointFunction:
    from deepspeed.runtime.activation_checkpointing import checkpointing

    checkpointing.configure(
        mpu_=Mpu(groups),  # partitions activations over its tensor-parallel ranks
        partition_activations=section.get("partition_activations", False),
        contiguous_checkpointing=section.get("contiguous_memory_optimization", False),
        num_checkpoints=section.get("number_checkpoints"),
        checkpoint_in_cpu=section.get("cpu_checkpointing", False),
        synchronize=section.get("synchronize_checkpoint_boundary", False),
    )
    return checkpointing.checkpoint
