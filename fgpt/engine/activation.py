"""Activation checkpointing as the DeepSpeed JSON's `activation_checkpointing` block says.

The block's presence turns it on. In FGPT each of its keys acts, or `fgpt.config.rules` refuses it:

    number_checkpoints               recomputed segments of blocks; default one per block
    cpu_checkpointing                keep the segments' inputs in host memory (GPU only)
    synchronize_checkpoint_boundary  synchronise the device at each segment
    partition_activations            tensor-parallel ranks share the segments' inputs out
    contiguous_memory_optimization   ... in one piece of memory
"""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import checkpoint as torch_checkpoint

from fgpt.model.gpt import GPT, Recompute
from fgpt.parallel.topology import Groups, Mpu


def apply_checkpointing(model: GPT, deepspeed_json: dict[str, Any], groups: Groups | None) -> None:
    """Have `model` recompute its blocks, if the JSON has the block.

    With `groups` DeepSpeed does it, which reads the rest of the block; without, torch.
    """
    section = deepspeed_json.get("activation_checkpointing")
    if section is None:
        return
    n_segments = section.get("number_checkpoints") or model.config.n_layer
    recompute = _torch() if groups is None else _deepspeed(deepspeed_json, groups)
    model.checkpoint_activations(recompute, n_segments)


def _torch() -> Recompute:
    return lambda run, x: torch_checkpoint(run, x, use_reentrant=False)


def _deepspeed(deepspeed_json: dict[str, Any], groups: Groups) -> Recompute:
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
