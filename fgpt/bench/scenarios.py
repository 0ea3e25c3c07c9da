"""What `fgpt bench single` and `fgpt bench multi` measure, as data.

A ladder's rungs add one thing after the other, from the loop that the published tables were
measured with to what FGPT does by default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fgpt.bench.workloads import WORKLOADS, Variant, Workload

Section = Literal["ladder", "memory", "compare", "layouts", "strong", "weak"]

SLOW: Mapping[str, Any] = {
    "model.attention": "reference",
    "speed.compile": "off",
    "speed.loss": "plain",
    "speed.matmul": "torch",
    "speed.keep_memory": False,
}
"""Everything that makes a step fast, off."""


def without(*names: str) -> dict[str, Any]:
    """`SLOW`, with these back at their defaults."""
    return {name: value for name, value in SLOW.items() if name not in names}


_KEPT = ("speed.matmul", "speed.keep_memory")
_ATTENTION = (*_KEPT, "model.attention")
_COMPILED = (*_ATTENTION, "speed.compile")

LADDER = (
    Variant(
        "base",
        "fp32, attention written out, torch's matrix products, plain Adam, no DeepSpeed",
        "plain_adam",
        "fp32",
        {**SLOW, "train.engine": "plain"},
    ),
    Variant("deepspeed", "DeepSpeed's ZeRO-1 engine", "zero1_plain_adam", "fp32", SLOW),
    Variant(
        "matrix products",
        "oneDNN's matrix products where torch's are slow",
        "zero1_plain_adam",
        "fp32",
        without("speed.matmul"),
        "cpu",
        slow_mkl=True,
    ),
    Variant(
        "memory kept",
        "freed memory stays for the next tensor",
        "zero1_plain_adam",
        "fp32",
        without(*_KEPT),
        "cpu",
    ),
    Variant(
        "bf16",
        "bf16 weights and gradients, fp32 master weights",
        "zero1_plain_adam",
        "bf16",
        without(*_KEPT),
    ),
    Variant(
        "fused attention",
        "attention that never holds all scores",
        "zero1_plain_adam",
        "fastest",
        without(*_ATTENTION),
    ),
    Variant(
        "compiled",
        "torch.compile of the blocks",
        "zero1_plain_adam",
        "fastest",
        without(*_COMPILED),
        "cuda",
    ),
    Variant(
        "fused optimizer",
        "Adam in one kernel for many tensors",
        "zero1",
        "fastest",
        without(*_COMPILED),
    ),
    Variant("best", "head and loss by chunks of tokens: FGPT's defaults", "zero1", "fastest"),
    Variant(
        "CUDA graphs",
        "the blocks replayed as CUDA graphs",
        "zero1",
        "fastest",
        {"speed.cuda_graphs": True},
        "cuda",
    ),
    Variant(
        "fp8",
        "the blocks' projections in 8 bits, other numbers: opt-in",
        "zero1",
        "bf16",
        {"speed.matmul": "fp8"},
        "cuda",
    ),
)

MEMORY = (
    Variant("recompute all", "blocks recomputed in the backward pass", "recompute", "fastest"),
    Variant(
        "recompute cheap",
        "the same, but matrix products and attention kept",
        "recompute",
        "fastest",
        {"speed.recompute": "cheap"},
    ),
    Variant("ZeRO-2", "on one rank: as ZeRO-1", "zero2", "fastest"),
    Variant("ZeRO-3", "weights gathered layer by layer", "zero3", "fastest"),
    Variant("ZeRO-2 offload", "optimizer and gradients in CPU memory", "zero2_offload", "fastest"),
    Variant("ZeRO-3 offload", "weights in CPU memory, too", "zero3_offload", "fastest"),
)


def _bare(precision: Literal["fp32", "bf16"]) -> tuple[Variant, ...]:
    """The best of FGPT, the same without DeepSpeed, and the peer, in one number format."""
    return (
        Variant(f"bare loop, {precision}", "no DeepSpeed", "zero1", precision, _PLAIN_ENGINE),
        Variant(
            f"FGPT, {precision}", "DeepSpeed ZeRO-1, the trainer's defaults", "zero1", precision
        ),
        Variant(
            f"transformers, {precision}",
            "GPT2LMHeadModel, AdamW, plain torch loop"
            + (", autocast" if precision == "bf16" else ""),
            "zero1",
            precision,
            subject="transformers",
        ),
    )


_PLAIN_ENGINE = {"train.engine": "plain"}
COMPARE = (
    *_bare("fp32"),
    *_bare("bf16"),
    Variant(
        "transformers, bf16 weights",
        "the same with weights and moments in bf16, GELU in one kernel, FGPT's malloc settings",
        "zero1",
        "bf16",
        subject="transformers, bf16 weights",
    ),
    Variant(
        "FGPT, compiled",
        "torch.compile of the blocks, on a CPU",
        "zero1",
        "fastest",
        {"speed.compile": "blocks"},
        "cpu",
    ),
    Variant(
        "transformers, compiled",
        "torch.compile of the peer's model",
        "zero1",
        "fastest",
        device="cuda",
        subject="transformers, compiled",
    ),
)


class Scenario(NamedTuple):
    """One rung of one row: a line of a table, a line of the records."""

    bench: Literal["single", "multi"]
    section: Section
    row: Workload
    rung: Variant
    reference: str
    """Name of the rung that it is compared with."""
    order: tuple[int, int]
    """Workload and rung number: records are listed by them."""


def single(
    ladder: Sequence[str], memory: Sequence[str], compare: Sequence[str]
) -> Iterator[Scenario]:
    """All scenarios on one device, for these rows of each section."""
    for number, row in enumerate(WORKLOADS.values()):
        place = 0
        for section, names, rungs in (
            ("ladder", ladder, LADDER),
            ("memory", memory, MEMORY),
            ("compare", compare, COMPARE),
        ):
            for rung in rungs if row.name in names else ():
                reference = COMPARE[0].name if section == "compare" else LADDER[0].name
                section_: Any = section
                yield Scenario("single", section_, row, rung, reference, (number, place))
                place += 1
