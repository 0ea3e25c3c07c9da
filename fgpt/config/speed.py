"""What `speed` means for a run: the choices behind "auto", and what stands against each of them.

The same for every rank, from the configuration alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fgpt.config.rules.context import Finding
from fgpt.config.schema import RunConfig

if TYPE_CHECKING:
    from fgpt.config.resolve import Resolved

BLOCK = "activation_checkpointing"
"""The JSON's block that `speed.recompute` goes with."""


def against_compiling(run: RunConfig, zero_stage: int) -> Iterator[Finding]:
    """What keeps blocks from being compiled as one graph that is good for every step."""
    if run.model.dropout > 0:
        yield Finding("run.speed.compile", f"blocks with model.dropout {run.model.dropout:g}")
    if run.data.document_mask:
        yield Finding("run.speed.compile", "blocks with data.document_mask true")
    if run.parallel.tp > 1:
        yield Finding("run.speed.compile", f"blocks with tp {run.parallel.tp}")
    if run.parallel.cp > 1:
        yield Finding("run.speed.compile", f"blocks with cp {run.parallel.cp}")
    if zero_stage == 3:
        yield Finding("run.speed.compile", "blocks with ZeRO-3")
    if run.speed.recompute == "cheap":
        yield Finding("run.speed.compile", "blocks with speed.recompute cheap")


def compiles_blocks(run: RunConfig, zero_stage: int, device: str) -> bool:
    """Whether torch.compile takes the blocks; of its own accord on a GPU only."""
    if run.speed.compile != "auto":
        return run.speed.compile == "blocks"
    return device != "cpu" and not any(against_compiling(run, zero_stage))


def against_fusing(run: RunConfig, precision: str | None) -> Iterator[Finding]:
    """What keeps head and loss apart: a split head's ranks, a pipeline's engine; and fp16, where
    the gradients of logits, ready before the loss is scaled, would be too small.
    """
    if precision == "fp16":
        yield Finding("run.speed.loss", "fused in fp16")
    for axis in ("tp", "pp"):
        size = getattr(run.parallel, axis)
        if size > 1:
            yield Finding("run.speed.loss", f"fused with {axis} {size}")


def fuses_loss(run: RunConfig, precision: str) -> bool:
    """Whether head and cross entropy are one, which never holds all logits."""
    if run.speed.loss != "auto":
        return run.speed.loss == "fused"
    return not any(against_fusing(run, precision))


def slow_paths(resolved: Resolved) -> list[str]:
    """Return one line for each fast way that this run does not take, with the reason."""
    run, lines = resolved.run, []
    if resolved.device != "cpu" and not compiles_blocks(run, resolved.zero_stage, resolved.device):
        lines += [f"no compiled {f.what}" for f in against_compiling(run, resolved.zero_stage)]
    if not fuses_loss(run, resolved.precision):
        lines += [f"the head and loss are not {f.what}" for f in against_fusing(run, None)]
    return lines
