"""The faults of `fgpt soak`, drawn from a seed.

A fault is either planned in the rank that it hits (`fgpt.utils.fault_injection`), at an exact place
of an exact step, or done from outside once that step is finished: at any moment after it.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MIN_STEPS, MAX_STEPS = 5, 15
"""Steps from the start of a run, or from the fault before, to a fault."""


@dataclass(frozen=True)
class FaultKind:
    """One sort of fault."""

    text: str
    """What happens; {rank} and {point} are those of the fault."""
    action: str = ""
    """Of the planned fault (`fgpt.utils.fault_injection`); "": it is done from outside."""
    points: tuple[str, ...] = ("",)
    """Where a planned fault may be."""
    in_save: bool = False
    """Whether these points are in a save."""
    signal: int = signal.SIGKILL
    """Sent from outside."""
    target: Literal["rank", "launcher", "all"] = "rank"
    """Who gets the signal."""
    flips_byte: bool = False
    """Whether the newest checkpoint is damaged then."""

    @property
    def ends_run(self) -> bool:
        """Whether the run must be started again."""
        return self.action != "full"


BY_RANK0 = ("before_rename", "before_latest")
"""Points of a save that only rank 0 reaches."""
IN_SAVE = ("before_shards", "after_shards", "before_manifest", *BY_RANK0)
WRITING = ("before_shards", "after_shards", *BY_RANK0)
"""Points at which the disk may be full."""
KINDS = (
    FaultKind("kill -9 of rank {rank}, {point}", "kill", ("data", "forward", "step")),
    FaultKind("kill -9 of rank {rank}", target="rank"),
    FaultKind("kill -9 of the launcher", target="launcher"),
    FaultKind("kill -9 of the launcher and all ranks", target="all"),
    FaultKind("SIGSTOP to rank {rank}", signal=signal.SIGSTOP),
    FaultKind("SIGTERM to rank {rank}", signal=signal.SIGTERM),
    FaultKind("SIGTERM to the launcher", signal=signal.SIGTERM, target="launcher"),
    FaultKind("kill -9 of rank {rank} in a save, {point}", "kill", IN_SAVE, in_save=True),
    FaultKind("exit of rank {rank} in a save, {point}", "exit", IN_SAVE, in_save=True),
    FaultKind("no space left for rank {rank} in a save, {point}", "full", WRITING, in_save=True),
    FaultKind("kill -9 of all, a byte of a file flipped", target="all", flips_byte=True),
)


@dataclass(frozen=True)
class PlannedFault:
    """One fault."""

    kind: FaultKind
    rank: int
    """The rank that it hits, if it hits one."""
    point: str
    after_steps: int
    """Steps from the start, or from the fault before it in the same start, to this one."""

    @property
    def name(self) -> str:
        """What happens, in words."""
        return self.kind.text.format(rank=self.rank, point=self.point)

    @property
    def is_planned_in_rank(self) -> bool:
        """Whether a rank does it to itself."""
        return bool(self.kind.action)

    def at_step(self, begin: int, save_every: int) -> int:
        """Return the step that it comes after, `after_steps` after `begin`, or at the next save."""
        step = begin + self.after_steps
        return -(-step // save_every) * save_every if self.kind.in_save else step

    def variable(self, step: int) -> str:
        """Return the value of FGPT_FAULT for this fault after `step`."""
        return f"{self.point}:{self.rank}:{step}:{self.kind.action}"


def draw_faults(n: int, ranks: int, seed: int) -> list[PlannedFault]:
    """Return n faults: every kind once, in random order, then every kind again, and so on."""
    draw = random.Random(f"faults {seed}")
    kinds: list[FaultKind] = []
    while len(kinds) < n:
        kinds += draw.sample(KINDS, len(KINDS))
    faults = []
    for kind in kinds[:n]:
        point = draw.choice(kind.points)
        rank = 0 if point in BY_RANK0 else draw.randrange(ranks)
        faults.append(PlannedFault(kind, rank, point, draw.randint(MIN_STEPS, MAX_STEPS)))
    return faults


def draw_layouts(n: int, layouts: Sequence[str], seed: int) -> list[str]:
    """Return the layouts of n starts; a start has another one than the start before."""
    draw = random.Random(f"layouts {seed}")
    drawn: list[str] = []
    while len(drawn) < n:
        others = [layout for layout in layouts if not drawn or layout != drawn[-1]]
        drawn.append(draw.choice(others or list(layouts)))
    return drawn
