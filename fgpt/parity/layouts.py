"""Parallel layouts by name, and the run in each layout.

A name joins at most one each of tp2 pp2 cp2 sp zero0..zero3 (or z0..z3) ckpt, as in tp2zero1. The
remaining ranks are data parallel. Without zeroN the DeepSpeed JSON's ZeRO stage holds.
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
from fgpt.config.deepspeed.settings import CHECKPOINTING, DeepSpeedSettings
from fgpt.config.field_syntax import parse_blocks
from fgpt.config.resolve import Resolved, RunRequest, examine, resolve
from fgpt.config.rules.run import DEEPSPEED_SWITCHES, DEEPSPEED_VALUES
from fgpt.config.run_file import Override, load
from fgpt.config.schema import ParallelConfig
from fgpt.errors import ConfigError, ConfigIssue, UserError

_TOKEN = re.compile(r"(tp|pp|cp)([1-9]\d*)|(sp)|z(?:ero)?([0-3])|(ckpt)")
_REFUSED_BY_PLAIN = (
    "zero_optimization",
    *DEEPSPEED_SWITCHES,
    *DEEPSPEED_VALUES,
    f"{CHECKPOINTING}.partition_activations",
    f"{CHECKPOINTING}.contiguous_memory_optimization",
)
"""Keys of a DeepSpeed JSON that the plain engine does not support."""


@dataclass(frozen=True)
class Layout:
    """One way to distribute a training run over the ranks."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence: bool = False
    stage: int | None = None
    """ZeRO stage; None: the JSON's."""
    recompute: bool = False
    """Activation checkpointing of each block."""

    @property
    def name(self) -> str:
        """The name that `parse_layout` reads; dp for data parallelism only."""
        sizes = {"tp": self.tp, "pp": self.pp, "cp": self.cp}
        parts = [f"{axis}{size}" for axis, size in sizes.items() if size != 1]
        parts += ["sp"] * self.sequence + [f"zero{self.stage}"] * (self.stage is not None)
        return "".join(parts + ["ckpt"] * self.recompute) or "dp"


def parse_layout(name: str) -> Layout:
    """Return the layout of a name. Raises UserError if it is not one."""
    layout, rest, seen = Layout(), "" if name == "dp" else name or " ", set[str]()
    while rest:
        part = _TOKEN.match(rest)
        key = part and (part[1] or part[3] or part[5] or "zero")
        if part is None or key is None or key in seen:
            raise UserError(
                f"--layouts: {name!r} is not a layout at {rest!r}: join tp2 pp2 cp2 sp"
                " zero0..zero3 ckpt, each at most once, or write dp or all"
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


def all_layouts(world: int) -> Iterator[Layout]:
    """Every layout of `world` ranks: grids x sequence x ZeRO stages, and grids with recomputation.

    Rules refuse some of them for some runs.
    """
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    for tp, pp, cp, sequence in itertools.product(sizes, sizes, sizes, (False, True)):
        if world % (tp * pp * cp) == 0:
            grid = Layout(tp=tp, pp=pp, cp=cp, sequence=sequence)
            for stage in range(4):
                yield replace(grid, stage=stage)
            yield replace(grid, stage=1, recompute=True)


@dataclass(frozen=True)
class ComparedRun:
    """The run that is compared in several layouts."""

    deepspeed: dict[str, Any]
    """The user's DeepSpeed JSON, translated and filled in."""
    request: RunRequest
    """The user's run file and flags."""
    world: int
    """Ranks."""
    device: str
    """cpu or cuda."""
    global_batch: int
    """Samples per step, the same for every layout."""
    micro: int
    """Samples per micro-batch, also the same: another size would round differently."""
    partition: str
    """The user's parallel.partition, for layouts with that number of stages."""
    steps: int
    """Steps to compare, from the first on."""

    def resolved(self, layout: Layout) -> Resolved:
        """Return the run in this layout. Raises ConfigError if a rule refuses it."""
        config = copy.deepcopy(self.deepspeed)
        settings = DeepSpeedSettings(config)
        if layout.stage not in (None, settings.zero_stage):
            config["zero_optimization"] = {"stage": layout.stage}  # stages read different keys
        if layout.recompute:
            config.setdefault(CHECKPOINTING, {})
        if settings.get("bf16.enabled") and layout.pp > 1:  # the rule pipeline-bf16
            config.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"
        place = f"layout {layout.name}: "
        try:
            engine = Override("train.engine", "deepspeed", "--layouts")
            resolved = self._resolve(config, [*self._grid(layout), engine], self.world)
        except ConfigError as error:
            raise ConfigError(
                [replace(issue, where=place + issue.where) for issue in error.issues]
            ) from None
        if layout.stage not in (None, resolved.zero_stage):
            what = f"stage {layout.stage} runs as {resolved.zero_stage}"
            raise ConfigError([ConfigIssue(place.rstrip(": "), what, "name that layout")])
        return resolved

    def oracle(self) -> Resolved:
        """Return the run in one process with the plain engine."""
        config = copy.deepcopy(self.deepspeed)
        for path in _REFUSED_BY_PLAIN:
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
        blocks = parse_blocks(self.partition)
        fits = layout.pp > 1 and (blocks is None or len(blocks) == layout.pp)
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


def user_run(
    request: RunRequest, world: int, device: str, steps: int
) -> tuple[Resolved, ComparedRun]:
    """Return a request's run on `world` ranks, as written and for other layouts.

    Raises ConfigError.
    """
    examined = examine(request, world=world, device=device)
    resolved = examined.resolved
    if resolved is None:
        raise ConfigError(examined.issues)
    batch, partition = resolved.batch, resolved.run.parallel.partition
    # the tree has the values of the flags, which would win over a layout's
    request = replace(request, deepspeed_flags=())
    compared_run = ComparedRun(
        examined.tree, request, world, device, batch.global_size, batch.micro, partition, steps
    )
    return resolved, compared_run


def make_compared_run(
    config: dict[str, Any], request: RunRequest, world: int, device: str, steps: int
) -> ComparedRun:
    """Return the run of a DeepSpeed JSON and a request on `world` ranks.

    Raises ConfigError, and UserError for fp16.
    """
    partition = load(request.run_file, request.overrides).run.parallel.partition
    default = Override("parallel.partition", ParallelConfig.partition, "--layouts")
    undivided = replace(request, overrides=(*request.overrides, default), deepspeed=config)
    resolved, compared_run = user_run(undivided, world, device, steps)
    if resolved.precision == "fp16":
        raise UserError("fgpt parity: the plain engine has no loss scaling: turn fp16 off")
    batch = resolved.batch
    # with dp = world every rank needs a micro-batch
    global_batch = math.lcm(batch.global_size, batch.micro * world)
    compared_run = replace(compared_run, global_batch=global_batch, partition=partition)
    compared_run.oracle()  # raises if the plain engine cannot run it
    return compared_run


def valid_layouts(compared_run: ComparedRun) -> list[tuple[Layout, Resolved]]:
    """Return every layout that no rule refuses, with its configuration."""
    layouts = []
    for layout in all_layouts(compared_run.world):
        try:
            layouts.append((layout, compared_run.resolved(layout)))
        except ConfigError:
            continue
    return layouts
