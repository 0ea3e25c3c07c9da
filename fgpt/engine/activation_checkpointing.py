"""Activation checkpointing as the DeepSpeed JSON's `activation_checkpointing` block says.

The block's presence turns it on. In FGPT each of its keys acts, or `fgpt.config.rules` refuses it:

    number_checkpoints               recomputed segments of blocks; default one per block
    cpu_checkpointing                keep the segments' inputs in host memory (GPU only)
    synchronize_checkpoint_boundary  synchronise the device at each segment
    partition_activations            tensor-parallel ranks share the segments' inputs out
    contiguous_memory_optimization   ... in one piece of memory

With the run file's `speed.recompute` "cheap", torch recomputes what is cheap and keeps the rest.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers torch_attn's operators
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from fgpt.config.schema import Recomputed
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
"""What "cheap" keeps: products with weights, and attention where it does not hold its scores."""


def apply_checkpointing(
    model: GPT, deepspeed_json: dict[str, Any], groups: ProcessGroups | None, recompute: Recomputed
) -> None:
    """Have `model` recompute its blocks, if the JSON has the block.

    With `groups` DeepSpeed does it, which reads the rest of the block; without, or where only what
    is cheap is to be recomputed, torch.
    """
    section = deepspeed_json.get("activation_checkpointing")
    if section is None:
        return
    n_segments = section.get("number_checkpoints") or model.config.n_layer
    if recompute == "cheap":
        run_again = _selective()
    else:
        run_again = _torch() if groups is None else _deepspeed(deepspeed_json, groups)
    model.checkpoint_activations(run_again, n_segments)


def _torch() -> CheckpointFunction:
    return lambda run, x: torch_checkpoint(run, x, use_reentrant=False)


def _selective() -> CheckpointFunction:
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return lambda run, x: torch_checkpoint(run, x, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in EXPENSIVE
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _deepspeed(deepspeed_json: dict[str, Any], groups: ProcessGroups) -> CheckpointFunction:
    from deepspeed.runtime.activation_checkpointing import checkpointing

    section = deepspeed_json["activation_checkpointing"]
    checkpointing.configure(
        mpu_=Mpu(groups),  # whose tensor ranks share partitioned activations
        partition_activations=section.get("partition_activations", False),
        contiguous_checkpointing=section.get("contiguous_memory_optimization", False),
        num_checkpoints=section.get("number_checkpoints"),
        checkpoint_in_cpu=section.get("cpu_checkpointing", False),
        synchronize=section.get("synchronize_checkpoint_boundary", False),
    )
    return checkpointing.checkpoint
