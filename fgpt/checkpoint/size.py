"""How large a checkpoint is, and the host memory that saving in the background takes."""

from __future__ import annotations

from fgpt.config.resolve import Resolved
from fgpt.parallel.tensor.sharding import full_shapes

GIB = 2**30


def checkpoint_bytes(resolved: Resolved) -> int:
    """Bytes of the tensors of one checkpoint, of all ranks together: each value is saved once."""
    settings, optimizer = resolved.settings, resolved.settings.optimizer
    assert optimizer is not None  # resolved
    master = 2 if settings.get("bf16.bf16_master_weights_and_grads") else 4
    state = 2 if settings.get("bf16.bf16_optimizer_states") else optimizer.state_bytes
    params = settings.optimizer_params
    master += 4 if resolved.run.train.ema is not None else 0
    return sum(
        (master + optimizer.n_states(name, len(shape), params) * state) * shape.numel()
        for name, shape in full_shapes(resolved.run.model).items()
    )


def kept_bytes(resolved: Resolved) -> int:
    """Bytes of all checkpoints that a run has on its disk at once, with one that it is writing."""
    steps, options = resolved.run.train.steps, resolved.run.checkpoint
    saved = (steps // options.every if options.every else 0) + 1
    forever = steps // options.keep_every if options.keep_every else 0
    return checkpoint_bytes(resolved) * (min(saved, options.keep + 1 + forever) + options.best)


def copy_bytes(resolved: Resolved, local_ranks: int) -> int:
    """Host memory for the copies that `local_ranks` ranks of a node keep: they share out a
    checkpoint about equally.
    """
    return -(-checkpoint_bytes(resolved) * local_ranks // resolved.batch.world)


def why_not_in_background(resolved: Resolved) -> str:
    """Why this run is saved while training waits; empty if it is saved in the background."""
    if not resolved.run.checkpoint.async_:
        return "checkpoint.async is false"
    if resolved.engine_settings.nvme_paths:
        return "the state on NVMe would have to fit into memory"
    return ""


def describe_saving(resolved: Resolved) -> str:
    """One line about size and memory, for `fgpt check`."""
    total = f"{checkpoint_bytes(resolved) / GIB:.3g} GiB each"
    if reason := why_not_in_background(resolved):
        return f"{total}; training waits for a save: {reason}"
    memory = f"{copy_bytes(resolved, 1) / GIB:.3g} GiB of host memory per rank"
    return f"{total}; written while training goes on, from copies that take {memory}"
