"""Rules about `speed`: what an explicit choice needs. "auto" never runs into one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from fgpt.config.context import Context, Finding, Rule
from fgpt.config.speed import BLOCK, against_compiling, against_fusing, compiles_blocks

_DEEPSPEEDS_OWN = (
    "partition_activations",
    "cpu_checkpointing",
    "contiguous_memory_optimization",
    "synchronize_checkpoint_boundary",
)


def _trusted(ctx: Context) -> None:
    """Be silent (`Faulty`) where what these rules look at is at fault."""
    for path in ("speed", "model.dropout", "data.document_mask"):
        ctx.run(path)
    for axis in ("tp", "cp", "pp"):
        ctx.run(f"parallel.{axis}")


def _compile_blocks(ctx: Context) -> Iterator[Finding]:
    _trusted(ctx)
    if ctx.run("speed.compile") == "blocks":
        yield from against_compiling(ctx.run_config, ctx.stage)


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++")))


def _compiler(ctx: Context) -> Iterator[Finding]:
    if ctx.device == "cpu" and ctx.run("speed.compile") == "blocks" and not has_compiler():
        yield Finding("run.speed.compile", "blocks on a CPU without a C++ compiler")


def _graphs(ctx: Context) -> Iterator[Finding]:
    _trusted(ctx)
    if not ctx.run("speed.cuda_graphs"):
        return
    if ctx.device == "cpu":
        yield Finding("run.speed.cuda_graphs", "true on a CPU")
    elif not compiles_blocks(ctx.run_config, ctx.stage, ctx.device):
        yield Finding("run.speed.cuda_graphs", "true, but the blocks are not compiled")


def _fused(ctx: Context) -> Iterator[Finding]:
    _trusted(ctx)
    if ctx.run("speed.loss") == "fused":
        yield from against_fusing(ctx.run_config, ctx.precision)


def _cheap(ctx: Context) -> Iterator[Finding]:
    if ctx.run("speed.recompute") != "cheap":
        return
    if not ctx.wrote(BLOCK):
        yield Finding("run.speed.recompute", f"cheap without {BLOCK}")
    for name in _DEEPSPEEDS_OWN:
        if ctx.ds(f"{BLOCK}.{name}"):
            yield Finding(f"deepspeed.{BLOCK}.{name}", "true with speed.recompute cheap")


RULES = (
    Rule(
        "compile-blocks",
        "Dropout and documents are told to the blocks anew in each step, and ranks and ZeRO-3 act"
        " inside them: they would be compiled again and again, or in pieces. What recomputation is"
        " to keep a compiled block uses again.",
        "write auto",
        _compile_blocks,
    ),
    Rule(
        "compile-needs-compiler",
        "On a CPU torch.compile writes C++.",
        "install g++, or write auto",
        _compiler,
    ),
    Rule(
        "cuda-graphs",
        "CUDA graphs replay the compiled blocks on a GPU.",
        "leave speed.cuda_graphs out",
        _graphs,
    ),
    Rule(
        "loss-fused",
        "Ranks that split the head exchange numbers between logits and loss, and DeepSpeed's"
        " pipeline engine calls the two apart.",
        "write auto",
        _fused,
    ),
    Rule(
        "recompute-cheap",
        "speed.recompute cheap is torch's recomputation of what activation_checkpointing asks"
        " for; these keys are DeepSpeed's.",
        "write activation_checkpointing without them, or speed.recompute all",
        _cheap,
    ),
)
