"""What `fgpt bench single` and `fgpt bench multi` measure, as data.

A workload is a model with its batch, a variant is one way to train it, and a scenario is one
variant of one workload. The ladder's variants each add one optimization, from the plain loop of the
published tables to FGPT's defaults.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Section = Literal["ladder", "memory", "compare", "layouts", "strong", "weak"]
Precision = Literal["fp32", "bf16", "fastest"]
Target = Literal["fgpt", "transformers", "transformers, bf16 weights", "transformers, compiled"]
"""Whose model and training loop is measured."""


class Workload(NamedTuple):
    """A model and its batch."""

    name: str
    """Model preset."""
    micro_batch: int
    """Samples per micro-batch."""
    seq_len: int
    """Tokens per sample."""


WORKLOADS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        *(Workload(f"seed-{size}m", 32, 128) for size in (1, 9, 71, 143, 286)),
        Workload("mini", 8, 256),
        Workload("gpt2", 32, 1024),
        Workload("gpt2-medium", 16, 1024),
        Workload("gpt2-large", 12, 1024),
        Workload("gpt2-xl", 8, 1024),
    )
}


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to train a workload."""

    name: str
    """Shown as env_name in the tables."""
    description: str
    """What it adds, in a few words."""
    ds_config: str
    """File in ds_configs/bench/, without its suffix."""
    precision: Precision
    """"fastest": bf16 where the device multiplies bf16 natively, else fp32."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Run-file values; all others are the trainer's defaults."""
    device: Literal["cpu", "cuda"] | None = None
    """The only device on which the variant applies; None: any."""
    slow_mkl: bool = False
    """Applies only where oneDNN multiplies matrices faster than torch's default (MKL)."""
    target: Target = "fgpt"
    ranks: int = 1
    """Processes, one per GPU; on a CPU they share its cores."""
    accumulation: int = 1
    """Micro-batches per step."""
    micro_batch: int | None = None
    """Replaces the workload's."""


UNOPTIMIZED: Mapping[str, Any] = {
    "model.attention": "reference",
    "speed.compile": "off",
    "speed.loss": "plain",
    "speed.matmul": "torch",
    "speed.keep_memory": False,
}
"""Every optimization off."""


def _without(*names: str) -> dict[str, Any]:
    """`UNOPTIMIZED`, with the named values back at their defaults."""
    return {name: value for name, value in UNOPTIMIZED.items() if name not in names}


_PLAIN_ENGINE = {"train.engine": "plain"}
_KEPT = ("speed.matmul", "speed.keep_memory")
_ATTENTION = (*_KEPT, "model.attention")
_COMPILED = (*_ATTENTION, "speed.compile")
_PLAIN_ADAM = "zero1_plain_adam"

LADDER = (
    Variant("base", "fp32, unfused attention, torch's matrix products, plain Adam, no DeepSpeed",
            "plain_adam", "fp32", {**UNOPTIMIZED, **_PLAIN_ENGINE}),
    Variant("deepspeed", "DeepSpeed's ZeRO-1 engine", _PLAIN_ADAM, "fp32", UNOPTIMIZED),
    Variant("matrix products", "oneDNN's matrix products where torch's are slow",
            _PLAIN_ADAM, "fp32", _without("speed.matmul"), "cpu", slow_mkl=True),
    Variant("memory kept", "malloc keeps freed memory for the next tensor",
            _PLAIN_ADAM, "fp32", _without(*_KEPT), "cpu"),
    Variant("bf16", "bf16 weights and gradients, fp32 master weights",
            _PLAIN_ADAM, "bf16", _without(*_KEPT)),
    Variant("fused attention", "attention that never materializes all scores",
            _PLAIN_ADAM, "fastest", _without(*_ATTENTION)),
    Variant("compiled", "torch.compile of the blocks",
            _PLAIN_ADAM, "fastest", _without(*_COMPILED), "cuda"),
    Variant("fused optimizer", "Adam in one kernel for many tensors",
            "zero1", "fastest", _without(*_COMPILED)),
    Variant("best", "head and loss by chunks of tokens: FGPT's defaults", "zero1", "fastest"),
    Variant("CUDA graphs", "the blocks replayed as CUDA graphs",
            "zero1", "fastest", {"speed.cuda_graphs": True}, "cuda"),
    Variant("fp8", "the blocks' projections in 8 bits (opt-in: changes the results)",
            "zero1", "bf16", {"speed.matmul": "fp8"}, "cuda"),
)  # fmt: skip

MEMORY = (
    Variant("recompute all", "blocks recomputed in the backward pass", "recompute", "fastest"),
    Variant("recompute cheap", "the same, but matrix products and attention are kept",
            "recompute", "fastest", {"speed.recompute": "cheap"}),
    Variant("ZeRO-2", "on one rank: as ZeRO-1", "zero2", "fastest"),
    Variant("ZeRO-3", "weights gathered layer by layer", "zero3", "fastest"),
    Variant("ZeRO-2 offload", "optimizer and gradients in CPU memory", "zero2_offload", "fastest"),
    Variant("ZeRO-3 offload", "weights in CPU memory, too", "zero3_offload", "fastest"),
)  # fmt: skip


def _compared_in(precision: Precision, autocast: str = "") -> tuple[Variant, ...]:
    """FGPT without and with DeepSpeed, and transformers, in one precision."""
    defaults = "DeepSpeed ZeRO-1, the trainer's defaults"
    peer = f"GPT2LMHeadModel, AdamW, plain torch loop{autocast}"
    return (
        Variant(f"bare loop, {precision}", "no DeepSpeed", "zero1", precision, _PLAIN_ENGINE),
        Variant(f"FGPT, {precision}", defaults, "zero1", precision),
        Variant(f"transformers, {precision}", peer, "zero1", precision, target="transformers"),
    )


COMPARE = (
    *_compared_in("fp32"),
    *_compared_in("bf16", ", autocast"),
    Variant("transformers, bf16 weights",
            "the same with weights and moments in bf16, GELU in one kernel, FGPT's malloc settings",
            "zero1", "bf16", target="transformers, bf16 weights"),
    Variant("FGPT, compiled", "torch.compile of the blocks, on a CPU",
            "zero1", "fastest", {"speed.compile": "blocks"}, "cpu"),
    Variant("transformers, compiled", "torch.compile of transformers' model",
            "zero1", "fastest", device="cuda", target="transformers, compiled"),
)  # fmt: skip


class Scenario(NamedTuple):
    """One variant of one workload: one row of a table, one line of the records."""

    bench: Literal["single", "multi"]
    section: Section
    workload: Workload
    variant: Variant
    reference: str
    """Name of the variant that it is compared with."""
    order: tuple[int, int]
    """Sort key of the records: for `single` (workload, variant), for `multi` (section, variant)."""

    @property
    def label(self) -> str:
        """Workload and variant, for messages."""
        return f"{self.workload.name}, {self.variant.name}"


def single_device_scenarios(
    ladder: Sequence[str], memory: Sequence[str], compare: Sequence[str]
) -> Iterator[Scenario]:
    """All scenarios on one device. Arguments: names of the workloads for each section."""
    sections: tuple[tuple[Section, Sequence[str], Sequence[Variant], str], ...] = (
        ("ladder", ladder, LADDER, LADDER[0].name),
        ("memory", memory, MEMORY, LADDER[0].name),
        ("compare", compare, COMPARE, COMPARE[0].name),
    )
    for number, workload in enumerate(WORKLOADS.values()):
        place = 0
        for section, names, variants, reference in sections:
            for variant in variants if workload.name in names else ():
                yield Scenario("single", section, workload, variant, reference, (number, place))
                place += 1


def multi_rank_scenarios(workload: Workload, n_ranks: int) -> Iterator[Scenario]:
    """Layouts, strong and weak scaling on up to `n_ranks` ranks.

    The reference is one rank with the global batch of two.
    """
    sizes = [n for n in (2, 4, 8, 16, 32, 64) if n < n_ranks]
    sizes += [n_ranks] if n_ranks > 1 else []
    batch = 2 * workload.micro_batch
    reference = Variant("1 rank", "one process with all cores", "zero1", "fastest", accumulation=2)
    strong = [
        Variant(f"{n} ranks", "the same batch", "zero1", "fastest", ranks=n, micro_batch=batch // n)
        for n in sizes
        if batch % n == 0
    ]
    weak = [
        Variant("1 rank, weak", "one rank's share of the batch", "zero1", "fastest"),
        *(
            Variant(f"{n} ranks, weak", f"{n} times the batch", "zero1", "fastest", ranks=n)
            for n in sizes
        ),
    ]
    sections: tuple[tuple[Section, list[Variant]], ...] = (
        ("layouts", [reference, *_layouts(workload, n_ranks)]),
        ("strong", strong),
        ("weak", weak),
    )
    for number, (section, variants) in enumerate(sections):
        for place, variant in enumerate(variants):
            yield Scenario("multi", section, workload, variant, reference.name, (number, place))


def _layouts(workload: Workload, n_ranks: int) -> Iterator[Variant]:
    """ZeRO, offload and each kind of parallelism on 2 ranks, pairs of kinds on 4; all with the
    global batch of 2 ranks.
    """
    if n_ranks < 2:
        return

    def two_ranks(name: str, description: str, ds_config: str = "zero1", **more: Any) -> Variant:
        return Variant(name, description, ds_config, "fastest", ranks=2, **more)

    tp2, pp2 = {"parallel.tp": 2}, {"parallel.pp": 2}
    sp2, cp2 = {**tp2, "parallel.sequence": True}, {"parallel.cp": 2}
    quarters: dict[str, Any] = {"accumulation": 4, "micro_batch": workload.micro_batch // 2}
    yield Variant("ZeRO-0, fp32", "everything on every rank", "zero0", "fp32", ranks=2)
    yield two_ranks("ZeRO-1", "optimizer states partitioned")
    yield two_ranks("ZeRO-2", "gradients partitioned, too", "zero2")
    yield two_ranks("ZeRO-3", "weights partitioned, too", "zero3")
    yield two_ranks("ZeRO-2 offload", "optimizer and gradients in CPU memory", "zero2_offload")
    yield two_ranks("tp 2", "each matrix sharded", overrides=tp2, accumulation=2)
    yield two_ranks("tp 2, sequence", "tokens sharded, too", overrides=sp2, accumulation=2)
    yield two_ranks("cp 2", "each sequence sharded", overrides=cp2, accumulation=2)
    pipeline_config = "zero1_fp32_gradients"
    yield two_ranks(
        "pp 2", "two stages, 4 micro-batches", pipeline_config, overrides=pp2, **quarters
    )
    if n_ranks >= 4:
        both = {**tp2, **pp2}
        yield Variant("tp 2 x pp 2", "both", pipeline_config, "fastest", both, ranks=4, **quarters)
        yield Variant("tp 2 x dp 2", "both", "zero1", "fastest", tp2, ranks=4)


MINIMUM_RANKS = 4
"""Ranks of `fgpt bench multi` on a machine with fewer GPUs: enough for every pair of kinds."""


def scenario_flags() -> Mapping[str, tuple[str, ...]]:
    """Name of a scenario -> the arguments of `fgpt bench` that measure it.

    Names are the variants' in lower case (zero2-offload, tp2-pp2, fused-attention), the layouts of
    several ranks before those of one device, and the workloads' (gpt2), for a whole ladder.
    """
    names = {name: ("single", "--rows", name) for name in WORKLOADS}
    for bench, variants in (
        ("multi", _layouts(WORKLOADS["mini"], MINIMUM_RANKS)),
        ("single", (*LADDER, *MEMORY, *COMPARE)),
    ):
        for variant in variants:
            names.setdefault(_short(variant.name), (bench, "--only", variant.name))
    return names


def _short(name: str) -> str:
    """tp 2 x pp 2 -> tp2-pp2; ZeRO-2 offload -> zero2-offload; ZeRO-0, fp32 -> zero0."""
    name = re.sub(r"zero-(\d)(, fp32)?", r"zero\1", name.lower())
    name = re.sub(r"\b(tp|pp|cp|dp) (\d)", r"\1\2", name)
    return re.sub(r"[^a-z0-9]+", "-", name.replace(" x ", "-"))
