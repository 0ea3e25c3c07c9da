"""What the run file's `speed` means for a run: the choices that "auto" makes, and their obstacles.

Pure functions of the configuration, with the same results on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fgpt.config.schema import RunConfig

if TYPE_CHECKING:
    from fgpt.config.resolve import Resolved


def compile_obstacles(run: RunConfig, zero_stage: int) -> Iterator[str]:
    """The settings with which blocks cannot be compiled to one graph that serves every step."""
    if run.model.dropout > 0:
        yield f"model.dropout {run.model.dropout:g}"
    if run.data.document_mask:
        yield "data.document_mask true"
    if run.parallel.tp > 1:
        yield f"tp {run.parallel.tp}"
    if run.parallel.cp > 1:
        yield f"cp {run.parallel.cp}"
    if zero_stage == 3:
        yield "ZeRO-3"
    if run.speed.recompute == "cheap":
        yield "speed.recompute cheap"


def compiles_blocks(run: RunConfig, zero_stage: int, device: str) -> bool:
    """Whether torch.compile compiles the blocks; "auto" does so only on a GPU."""
    if run.speed.compile != "auto":
        return run.speed.compile == "blocks"
    return device != "cpu" and not any(compile_obstacles(run, zero_stage))


def fused_loss_obstacles(run: RunConfig, precision: str) -> Iterator[str]:
    """The settings with which the output head and the loss cannot be one operation."""
    if precision == "fp16":
        yield "fp16"
    for axis in ("tp", "pp"):
        size = getattr(run.parallel, axis)
        if size > 1:
            yield f"{axis} {size}"


def fuses_loss(run: RunConfig, precision: str) -> bool:
    """Whether the output head and the loss are one operation, which never holds all logits."""
    if run.speed.loss != "auto":
        return run.speed.loss == "fused"
    return not any(fused_loss_obstacles(run, precision))


def fused_attention_obstacles(run: RunConfig) -> Iterator[str]:
    """The settings with which attention holds all its scores instead of using a fused kernel."""
    if run.model.attention != "sdpa":
        yield f"model.attention {run.model.attention}"


def slow_paths(resolved: Resolved) -> list[str]:
    """One line for each fast implementation that this run does not use, with the reasons.

    Compiled blocks count on a GPU only, where "auto" would compile them.
    """
    run, lines = resolved.run, []

    def report(feature: str, obstacles: list[str]) -> None:
        if obstacles:
            lines.append(f"{feature}: off because of {', '.join(obstacles)}")

    report("fused attention", list(fused_attention_obstacles(run)))
    if not compiles_blocks(run, resolved.zero_stage, resolved.device) and resolved.device != "cpu":
        off = ["speed.compile off"] if run.speed.compile == "off" else []
        report("compiled blocks", off or list(compile_obstacles(run, resolved.zero_stage)))
    if not fuses_loss(run, resolved.precision):
        plain = ["speed.loss plain"] if run.speed.loss == "plain" else []
        report("fused head and loss", plain or list(fused_loss_obstacles(run, resolved.precision)))
    return lines
