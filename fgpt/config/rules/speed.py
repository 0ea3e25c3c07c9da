"""Rules about `speed`: what an explicit choice needs. "auto" never runs into one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from fgpt.config.rules.context import Context, Finding, Rule
from fgpt.config.rules.grid import sound_batch
from fgpt.config.shapes import Shapes
from fgpt.config.speed import BLOCK, against_compiling, against_fusing, compiles_blocks

MULTIPLE = 16
"""Of which fp8 products need every size to be one."""
_DEEPSPEEDS_OWN = (
    "partition_activations",
    "cpu_checkpointing",
    "contiguous_memory_optimization",
    "synchronize_checkpoint_boundary",
)


def _trusted(ctx: Context) -> None:
    """Be silent (`InvalidValueError`) where what these rules look at is at issue."""
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


def _fp8(ctx: Context) -> Iterator[Finding]:
    if ctx.run("speed.matmul") != "fp8":
        return
    if ctx.precision != "bf16":
        yield Finding("run.speed.matmul", f"fp8 in {ctx.precision}")
    if ctx.run("parallel.tp") > 1:
        yield Finding("run.speed.matmul", f"fp8 with tp {ctx.run('parallel.tp')}")
    model, shapes = ctx.run("model"), Shapes.of(ctx.run("model"))
    sizes = {
        "model.d_model": model.d_model,
        "heads times width": shapes.n_head * shapes.d_head,
        "the q, k, v projection's width": shapes.d_qkv,
        "model.d_ff": shapes.d_ff,
    }
    for what, size in sizes.items():
        if size % MULTIPLE:
            yield Finding("run.speed.matmul", f"fp8, and {what} is {size}")
    batch = sound_batch(ctx)
    tokens = MULTIPLE if batch is None else batch.micro * ctx.run("data.seq_len") // batch.cp
    if tokens % MULTIPLE:
        yield Finding("run.speed.matmul", f"fp8, and a rank's micro-batch has {tokens} tokens")


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
        "fp8",
        "fp8's products take sizes that are multiples of 16, come from bf16 and return to it; the"
        " layers that tensor-parallel ranks share do not have them.",
        "write speed.matmul auto, or change these",
        _fp8,
    ),
    Rule(
        "recompute-cheap",
        "speed.recompute cheap is torch's recomputation of what activation_checkpointing asks"
        " for; these keys are DeepSpeed's.",
        "write activation_checkpointing without them, or speed.recompute all",
        _cheap,
    ),
)
