"""Names of layouts, and which of them a configuration can have.

A name is written together from parts, each at most once: tp2 pp2 cp2 sp zero0..zero3 ckpt. What is
left of the ranks is data parallel. Without zeroN the DeepSpeed JSON's own stage is meant.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fgpt.config.batch import ACCUMULATION, GLOBAL, MICRO
from fgpt.config.load import load
from fgpt.config.pipeline_partition import blocks_by_hand
from fgpt.config.request import Override, RunRequest
from fgpt.config.resolve import Resolved, resolve
from fgpt.config.rules.plain import PLAIN_CANNOT_HOLD, PLAIN_IGNORES
from fgpt.config.schema import ParallelConfig
from fgpt.errors import ConfigError, UserError

_PART = re.compile(r"(tp|pp|cp)(\d+)|(sp)|zero([0-3])|(ckpt)")
_CHECKPOINTING = "activation_checkpointing"
_NOT_THE_ORACLES = (
    *PLAIN_IGNORES,
    *PLAIN_CANNOT_HOLD,
    f"{_CHECKPOINTING}.partition_activations",
    f"{_CHECKPOINTING}.contiguous_memory_optimization",
)
"""What a DeepSpeed JSON says of ranks, devices and DeepSpeed's own output."""


@dataclass(frozen=True)
class Layout:
    """One way to spread the same training run over the ranks."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence: bool = False
    stage: int | None = None
    """ZeRO stage; None: the JSON's."""
    recompute: bool = False
    """Activation checkpointing, one run of blocks for each block."""

    @property
    def name(self) -> str:
        """As `parse` reads it; `dp` where there is nothing else to say."""
        sizes = {"tp": self.tp, "pp": self.pp, "cp": self.cp}
        parts = [f"{axis}{size}" for axis, size in sizes.items() if size != 1]
        parts += ["sp"] * self.sequence + [f"zero{self.stage}"] * (self.stage is not None)
        return "".join(parts + ["ckpt"] * self.recompute) or "dp"


def parse(name: str) -> Layout:
    """The layout of a name. Raises UserError for what is none."""
    layout, rest, seen = Layout(), "" if name == "dp" else name or " ", set[str]()
    while rest:
        part = _PART.match(rest)
        key = part and (part[1] or part[3] or part[5] or "zero")
        if part is None or key is None or key in seen:
            raise UserError(
                f"--layouts: {name!r} is no layout at {rest!r}: write parts of tp2 pp2 cp2 sp"
                " zero0..zero3 ckpt together, each once, or dp, or all"
            )
        seen.add(key)
        rest = rest[part.end() :]
        if part[1]:
            size: dict[str, Any] = {part[1]: int(part[2])}
            layout = replace(layout, **size)
        else:
            layout = replace(
                layout,
                sequence=layout.sequence or part[3] is not None,
                stage=layout.stage if part[4] is None else int(part[4]),
                recompute=layout.recompute or part[5] is not None,
            )
    return layout


def every(world: int) -> Iterator[Layout]:
    """Every layout of `world` ranks, legal or not: grids x sequence x ZeRO stages, and each grid
    with recomputation.
    """
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    for tp, pp, cp, sequence in itertools.product(sizes, sizes, sizes, (False, True)):
        if world % (tp * pp * cp) == 0:
            grid = Layout(tp=tp, pp=pp, cp=cp, sequence=sequence)
            for stage in range(4):
                yield replace(grid, stage=stage)
            yield replace(grid, stage=1, recompute=True)


@dataclass(frozen=True)
class Subject:
    """The run whose layouts are compared."""

    deepspeed: dict[str, Any]
    """The user's DeepSpeed JSON."""
    request: RunRequest
    """The user's run file and flags."""
    world: int
    """Ranks."""
    device: str
    """cpu or cuda."""
    global_batch: int
    """Samples per step, the same for every layout."""
    micro: int
    """Samples per micro-batch, the same too: an odd one out would round differently."""
    partition: str
    """The user's division into stages, for layouts that have as many."""
    steps: int
    """Steps to compare, the first ones of the run."""

    def resolved(self, layout: Layout) -> Resolved:
        """The run in this layout. Raises ConfigError where a rule refuses it."""
        config = copy.deepcopy(self.deepspeed)
        zero = config.get("zero_optimization", {})
        if layout.stage not in (None, zero.get("stage", 0)):
            config["zero_optimization"] = {"stage": layout.stage}  # the other keys go with a stage
        if layout.recompute:
            config.setdefault(_CHECKPOINTING, {})
        half = config.get("bf16", {}).get("enabled")
        if half and layout.pp > 1:
            config.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"
        try:
            return self._resolve(config, self._grid(layout), self.world)
        except ConfigError as error:
            at = f"layout {layout.name}: "
            raise ConfigError([replace(f, where=at + f.where) for f in error.issues]) from None

    def oracle(self) -> Resolved:
        """The run in one process, without DeepSpeed."""
        config = copy.deepcopy(self.deepspeed)
        for path in ("zero_optimization", *_NOT_THE_ORACLES):
            _delete(config, path.split("."))
        plain = Override("train.engine", "plain", "--layouts")
        return self._resolve(config, [*self._grid(Layout()), plain], 1)

    def _grid(self, layout: Layout) -> list[Override]:
        fields: dict[str, Any] = {
            "tp": layout.tp,
            "pp": layout.pp,
            "cp": layout.cp,
            "sequence": layout.sequence,
        }
        by_hand = blocks_by_hand(self.partition)
        fits = layout.pp > 1 and (by_hand is None or len(by_hand) == layout.pp)
        fields["partition"] = self.partition if fits else ParallelConfig.partition
        flag = f"--layouts {layout.name}"
        return [Override(f"parallel.{name}", value, flag) for name, value in fields.items()]

    def _resolve(self, config: dict[str, Any], changes: list[Override], world: int) -> Resolved:
        config[GLOBAL], config[MICRO] = self.global_batch, self.micro
        config.pop(ACCUMULATION, None)
        overrides = (*self.request.overrides, *changes)
        request = replace(self.request, overrides=overrides, deepspeed=config)
        return resolve(request, world=world, device=self.device)


def _delete(tree: dict[str, Any], path: list[str]) -> None:
    for name in path[:-1]:
        tree = tree.get(name, {})
    tree.pop(path[-1], None)


def subject_of(
    config: dict[str, Any], request: RunRequest, world: int, device: str, steps: int
) -> Subject:
    """What a DeepSpeed JSON and a request ask for on this many ranks. Raises ConfigError."""
    partition = load(request.run_file, request.overrides).run.parallel.partition
    whole = Override("parallel.partition", ParallelConfig.partition, "--layouts")
    without = replace(request, overrides=(*request.overrides, whole), deepspeed=config)
    asked = resolve(without, world=world, device=device)
    if asked.precision == "fp16":
        raise UserError("fgpt parity: the oracle has no loss scaling: turn fp16 off, or bf16 on")
    batch = asked.batch
    # data parallel over all ranks must have a micro-batch for each
    global_batch = math.lcm(batch.global_size, batch.micro * world)
    sizes = (global_batch, batch.micro)
    subject = Subject(config, request, world, device, *sizes, partition, steps)
    subject.oracle()
    return subject


def legal(subject: Subject) -> list[tuple[Layout, Resolved]]:
    """Every layout that no rule refuses."""
    found = []
    for layout in every(subject.world):
        try:
            found.append((layout, subject.resolved(layout)))
        except ConfigError:
            continue
    return found
