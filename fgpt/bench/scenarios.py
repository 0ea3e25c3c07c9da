"""What `fgpt bench single` and `fgpt bench multi` measure, as data.

A row is a model with its batch. A rung is one way to train it; a ladder's rungs add one thing after
the other, from the loop that the published tables were measured with to what FGPT does by default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Section = Literal["ladder", "memory", "compare", "layouts", "strong", "weak"]
Subject = Literal["fgpt", "transformers", "transformers, compiled"]


class Row(NamedTuple):
    """A model and its batch."""

    name: str
    """Model preset."""
    micro_batch: int
    """Samples of a micro-batch."""
    seq_len: int
    """Tokens of a sample."""


ROWS: Mapping[str, Row] = {
    row.name: row
    for row in (
        *(Row(f"seed-{size}m", 32, 128) for size in (1, 9, 71, 143, 286)),
        Row("mini", 8, 256),
        Row("gpt2", 32, 1024),
        Row("gpt2-medium", 16, 1024),
        Row("gpt2-large", 12, 1024),
        Row("gpt2-xl", 8, 1024),
    )
}


@dataclass(frozen=True, eq=False)
class Rung:
    """One way to train a model."""

    name: str
    """The env_name of the tables."""
    adds: str
    """What is new in it, in a few words."""
    json: str
    """Which of ds_configs/bench/, without its ending."""
    precision: Literal["fp32", "bf16", "fastest"]
    """fastest: bf16 where the device multiplies it, else fp32."""
    sets: Mapping[str, Any] = field(default_factory=dict)
    """Run-file values; all others are the trainer's defaults."""
    device: Literal["cpu", "cuda"] | None = None
    """The only device on which it is something; None: any."""
    slow_mkl: bool = False
    """Only where oneDNN multiplies faster than torch's own choice."""
    subject: Subject = "fgpt"
    """Whose model and loop."""
    ranks: int = 1
    """Processes, one to a GPU; on a CPU they share its cores."""
    accumulation: int = 1
    """Micro-batches of one step."""
    micro_batch: int | None = None
    """Instead of the row's."""


SLOW: Mapping[str, Any] = {
    "model.attention": "reference",
    "speed.compile": "off",
    "speed.loss": "plain",
    "speed.matmul": "torch",
}
"""Everything that makes a step fast, off."""


def without(*names: str) -> dict[str, Any]:
    """`SLOW`, with these back at their defaults."""
    return {name: value for name, value in SLOW.items() if name not in names}


_ATTENTION = ("speed.matmul", "model.attention")
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
        "bf16",
        "bf16 weights and gradients, fp32 master weights",
        "zero1_plain_adam",
        "bf16",
        without("speed.matmul"),
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
    Rung("fused cross entropy", "head and loss by chunks of tokens", "zero1", "fastest"),
    Rung(
        "CUDA graphs",
        "the blocks replayed as CUDA graphs",
        "zero1",
        "fastest",
        {"speed.cuda_graphs": True},
        "cuda",
    ),
    Rung("best", "what launchers/train.py does by default", "zero1", "fastest"),
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
    Rung("ZeRO-2", "gradients in buckets", "zero2", "fastest"),
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


def multi(row: Row, n_ranks: int) -> Iterator[Scenario]:
    """All scenarios on up to `n_ranks` ranks. One rank takes the global batch of two."""
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < n_ranks] + [n_ranks]
    first = Rung("1 rank", "one process with all cores", "zero1", "fastest", accumulation=2)
    alone = Rung("1 rank, weak", "one rank's share of the batch", "zero1", "fastest")
    more = [n for n in sizes if n > 1]
    sections: tuple[tuple[Section, list[Rung]], ...] = (
        ("layouts", [first, *_layouts(n_ranks)]),
        ("strong", [_strong(n, row) for n in more]),
        ("weak", [alone, *(_weak(n) for n in more)]),
    )
    for number, (section, rungs) in enumerate(sections):
        for place, rung in enumerate(rungs):
            yield Scenario("multi", section, row, rung, first.name, (number, place))


def _layouts(n_ranks: int) -> Iterator[Rung]:
    """ZeRO, offload and each kind of parallelism over two ranks, pairs of kinds over four."""
    stages = {
        "ZeRO-0, fp32": ("zero0", "everything on every rank"),
        "ZeRO-1": ("zero1", "the optimizer's state shared out"),
        "ZeRO-2": ("zero2", "gradients, too"),
        "ZeRO-3": ("zero3", "weights, too"),
        "ZeRO-2 offload": ("zero2_offload", "optimizer and gradients in CPU memory"),
    }
    for name, (json, adds) in stages.items():
        yield Rung(name, adds, json, "fp32" if json == "zero0" else "fastest", ranks=2)
    tp2, pp2 = {"parallel.tp": 2}, {"parallel.pp": 2}
    sp2 = {**tp2, "parallel.sequence": True}
    halves: dict[str, Any] = {"ranks": 2, "accumulation": 2}
    yield Rung("tp 2", "each matrix shared out", "zero1", "fastest", tp2, **halves)
    yield Rung("tp 2, sequence", "tokens between them, too", "zero1", "fastest", sp2, **halves)
    yield Rung("cp 2", "each sequence shared out", "zero1", "fastest", {"parallel.cp": 2}, **halves)
    quarters: dict[str, Any] = {"accumulation": 4, "micro_batch": 4}
    summed = "zero1_fp32_gradients"
    yield Rung("pp 2", "two stages, 4 micro-batches", summed, "fastest", pp2, ranks=2, **quarters)
    if n_ranks >= 4:
        both = {**tp2, **pp2}
        yield Rung("tp 2 x pp 2", "both", summed, "fastest", both, ranks=4, **quarters)
        yield Rung("tp 2 x dp 2", "both", "zero1", "fastest", tp2, ranks=4)


def _strong(n: int, row: Row) -> Rung:
    """The reference's global batch over n ranks."""
    micro = max(1, 2 * row.micro_batch // n)
    return Rung(f"{n} ranks", "the same batch", "zero1", "fastest", ranks=n, micro_batch=micro)


def _weak(n: int) -> Rung:
    return Rung(f"{n} ranks, weak", f"{n} times the batch", "zero1", "fastest", ranks=n)
