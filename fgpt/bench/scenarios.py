"""What `fgpt bench single` and `fgpt bench multi` measure, as data.

A ladder's rungs add one thing after the other, from the loop that the published tables were
measured with to what FGPT does by default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fgpt.bench.workloads import ROWS, Row, Rung

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
    Rung(
        "base",
        "fp32, attention written out, torch's matrix products, plain Adam, no DeepSpeed",
        "plain_adam",
        "fp32",
        {**SLOW, "train.engine": "plain"},
    ),
    Rung("deepspeed", "DeepSpeed's ZeRO-1 engine", "zero1_plain_adam", "fp32", SLOW),
    Rung(
        "matrix products",
        "oneDNN's matrix products where torch's are slow",
        "zero1_plain_adam",
        "fp32",
        without("speed.matmul"),
        "cpu",
        slow_mkl=True,
    ),
    Rung(
        "memory kept",
        "freed memory stays for the next tensor",
        "zero1_plain_adam",
        "fp32",
        without(*_KEPT),
        "cpu",
    ),
    Rung(
        "bf16",
        "bf16 weights and gradients, fp32 master weights",
        "zero1_plain_adam",
        "bf16",
        without(*_KEPT),
    ),
    Rung(
        "fused attention",
        "attention that never holds all scores",
        "zero1_plain_adam",
        "fastest",
        without(*_ATTENTION),
    ),
    Rung(
        "compiled",
        "torch.compile of the blocks",
        "zero1_plain_adam",
        "fastest",
        without(*_COMPILED),
        "cuda",
    ),
    Rung(
        "fused optimizer",
        "Adam in one kernel for many tensors",
        "zero1",
        "fastest",
        without(*_COMPILED),
    ),
    Rung("best", "head and loss by chunks of tokens: FGPT's defaults", "zero1", "fastest"),
    Rung(
        "CUDA graphs",
        "the blocks replayed as CUDA graphs",
        "zero1",
        "fastest",
        {"speed.cuda_graphs": True},
        "cuda",
    ),
    Rung(
        "fp8",
        "the blocks' projections in 8 bits, other numbers: opt-in",
        "zero1",
        "bf16",
        {"speed.matmul": "fp8"},
        "cuda",
    ),
)

MEMORY = (
    Rung("recompute all", "blocks recomputed in the backward pass", "recompute", "fastest"),
    Rung(
        "recompute cheap",
        "the same, but matrix products and attention kept",
        "recompute",
        "fastest",
        {"speed.recompute": "cheap"},
    ),
    Rung("ZeRO-2", "on one rank: as ZeRO-1", "zero2", "fastest"),
    Rung("ZeRO-3", "weights gathered layer by layer", "zero3", "fastest"),
    Rung("ZeRO-2 offload", "optimizer and gradients in CPU memory", "zero2_offload", "fastest"),
    Rung("ZeRO-3 offload", "weights in CPU memory, too", "zero3_offload", "fastest"),
)


def _bare(precision: Literal["fp32", "bf16"]) -> tuple[Rung, ...]:
    """The best of FGPT, the same without DeepSpeed, and the peer, in one number format."""
    return (
        Rung(f"bare loop, {precision}", "no DeepSpeed", "zero1", precision, _PLAIN_ENGINE),
        Rung(f"FGPT, {precision}", "DeepSpeed ZeRO-1, the trainer's defaults", "zero1", precision),
        Rung(
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
    Rung(
        "transformers, bf16 weights",
        "the same with weights and moments in bf16, GELU in one kernel, FGPT's malloc settings",
        "zero1",
        "bf16",
        subject="transformers, bf16 weights",
    ),
    Rung(
        "FGPT, compiled",
        "torch.compile of the blocks, on a CPU",
        "zero1",
        "fastest",
        {"speed.compile": "blocks"},
        "cpu",
    ),
    Rung(
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
    row: Row
    rung: Rung
    reference: str
    """Name of the rung that it is compared with."""
    order: tuple[int, int]
    """Row and rung number: records are listed by them."""


def single(
    ladder: Sequence[str], memory: Sequence[str], compare: Sequence[str]
) -> Iterator[Scenario]:
    """All scenarios on one device, for these rows of each section."""
    for number, row in enumerate(ROWS.values()):
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
