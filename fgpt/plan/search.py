"""`fgpt plan --fit`: every layout that FGPT can run of a model on a cluster, the fastest first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fgpt.config.schema import ModelConfig, Shapes
from fgpt.plan.cluster import Cluster
from fgpt.plan.footprint import GIB, RankMemory, worst_stage
from fgpt.plan.planned_run import PlannedRun, Recompute
from fgpt.plan.time import StepTime, step_time

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
RECOMPUTES: tuple[Recompute, ...] = ("none", "cheap", "full")
MAX_CP = 16
BUCKET_ELEMENTS = 50_000_000
"""Of DeepSpeed's reduce bucket, which is allocated whole."""
RESERVE_SHARE = 0.05
"""Of a device's memory that a chosen layout leaves: allocators fragment it."""


@dataclass(frozen=True)
class Candidate:
    """A layout with what is predicted of it."""

    run: PlannedRun
    cluster: Cluster

    @cached_property
    def time(self) -> StepTime:
        return step_time(self.run, self.cluster)

    @cached_property
    def memory(self) -> RankMemory:
        """Of the rank that needs most."""
        return worst_stage(self.run, self.cluster)

    @cached_property
    def margin_gib(self) -> float:
        """What is left of the device's memory; below 0: it does not fit."""
        return self.cluster.device.memory_gib - self.memory.device_total / GIB

    @property
    def host_margin_gib(self) -> float:
        """What is left of a node's host memory; below 0: what is offloaded does not fit."""
        ranks = min(self.cluster.gpus_per_node, self.cluster.gpus)
        return self.cluster.device.host_gib_per_node - ranks * self.memory.host / GIB

    @property
    def fits(self) -> bool:
        return self.margin_gib >= 0 and self.host_margin_gib >= 0

    @property
    def is_safe(self) -> bool:
        """Whether it fits with a reserve."""
        return self.fits and self.margin_gib >= RESERVE_SHARE * self.cluster.device.memory_gib

    @property
    def tokens_s(self) -> float:
        return self.run.tokens_per_step / self.time.total


@dataclass(frozen=True)
class SearchSpace:
    """What is given, and what may be chosen."""

    model: ModelConfig
    cluster: Cluster
    seq_len: int
    global_batch: int
    """Samples of a step."""
    precision: str = "bf16"
    offload: bool = True
    """Whether optimizer states may be kept in host memory."""

    def candidates(self) -> Iterator[Candidate]:
        """Every layout that the rules of fgpt.config allow. Order: by degrees."""
        for tp, pp, cp in self._grids():
            dp = self.cluster.gpus // (tp * pp * cp)
            if self.global_batch % dp:
                continue
            for micro in MICRO_BATCHES:
                if self.global_batch % (dp * micro):
                    continue
                accumulation = self.global_batch // (dp * micro)
                for zero, offloads in self._states(pp, dp * cp):
                    for recompute in RECOMPUTES:
                        yield self._candidate(
                            tp, pp, cp, dp, micro, accumulation, zero, offloads, recompute
                        )

    def _grids(self) -> Iterator[tuple[int, int, int]]:
        gpus, model = self.cluster.gpus, self.model
        shapes = Shapes.of(model)
        for tp in divisors(gpus):
            if tp > self.cluster.gpus_per_node or shapes.n_kv_head % tp or shapes.d_ff % tp:
                continue
            for pp in divisors(gpus // tp):
                if pp > model.n_layer:
                    continue
                for cp in divisors(gpus // (tp * pp)):
                    if cp > MAX_CP or shapes.n_kv_head % (tp * cp) or self.seq_len % (tp * cp):
                        continue
                    yield tp, pp, cp

    def _states(self, pp: int, replicas: int) -> Iterator[tuple[int, bool]]:
        """(ZeRO stage, whether the optimizer is offloaded). A pipeline allows at most stage 1; FGPT
        adds gradients up in fp32, for which bf16 needs at least stage 1 in DeepSpeed; stages above
        that shard nothing without replicas.
        """
        lowest = 0 if self.precision == "fp16" else 1
        stages = range(lowest, 2 if pp > 1 or replicas == 1 else 4)
        for stage in stages:
            yield stage, False
            if self.offload and pp == 1 and stage in (2, 3):
                yield stage, True

    def _candidate(
        self,
        tp: int,
        pp: int,
        cp: int,
        dp: int,
        micro: int,
        accumulation: int,
        zero: int,
        offloads: bool,
        recompute: Recompute,
    ) -> Candidate:
        run = PlannedRun(
            model=self.model,
            seq_len=self.seq_len,
            micro=micro,
            accumulation=accumulation,
            precision="fp16" if self.precision == "fp16" else "bf16",
            tp=tp,
            pp=pp,
            cp=cp,
            dp=dp,
            zero_stage=zero,
            sequence=tp > 1,
            recompute=recompute,
            # BF16_Optimizer (ZeRO-1) keeps fp32 sums beside the bf16 gradients
            gradient_bytes=6 if zero == 1 and not offloads else 4,
            bucket_elements=BUCKET_ELEMENTS,
            overlaps_reduction=zero == 3,  # DeepSpeed's default
            offloads_optimizer=offloads,
            is_compiled=tp == 1 and cp == 1 and zero < 3 and recompute != "cheap",
        )
        return Candidate(run, self.cluster)


def divisors(n: int) -> list[int]:
    """Return the divisors of n, the smallest first."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def search(space: SearchSpace) -> list[Candidate]:
    """Return the candidates that fit with a reserve, the fastest first, and of equally fast ones
    the simplest.
    """
    fitting = [candidate for candidate in space.candidates() if candidate.is_safe]
    return sorted(fitting, key=lambda c: (c.time.total, c.run.pp, c.run.tp, c.run.zero_stage))


def neighbours(chosen: Candidate, space: SearchSpace) -> list[tuple[str, Candidate]]:
    """Return the layouts one step away from the chosen one, each with what differs: half or twice a
    degree, another micro-batch, ZeRO stage or recomputation.
    """
    names = ("tp", "pp", "cp", "dp", "micro", "zero_stage", "recompute", "offloads_optimizer")

    def differing(other: Candidate) -> list[str]:
        return [n for n in names if getattr(other.run, n) != getattr(chosen.run, n)]

    found = []
    for other in space.candidates():
        changed = differing(other)
        degrees = [n for n in changed if n in ("tp", "pp", "cp", "dp")]
        choices = [n for n in changed if n not in degrees]
        one_choice = not degrees and len(choices) == 1
        one_degree = len(degrees) == 2 and not choices and _is_factor_2(chosen, other, degrees)
        if one_choice or one_degree:
            what = ", ".join(f"{_word(n)} {_value(other.run, n)}" for n in changed if n != "dp")
            found.append((what, other))
    return found


def _is_factor_2(a: Candidate, b: Candidate, names: Sequence[str]) -> bool:
    sizes = [(getattr(a.run, name), getattr(b.run, name)) for name in names]
    return all(max(pair) == 2 * min(pair) for pair in sizes)


def _word(name: str) -> str:
    words = {"zero_stage": "ZeRO", "micro": "micro-batch", "offloads_optimizer": "offload"}
    return words.get(name, name)


def _value(run: PlannedRun, name: str) -> str:
    value = getattr(run, name)
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def largest_micro_batch(run: PlannedRun, cluster: Cluster) -> int:
    """Return the largest micro-batch of this layout that fits, in samples; 0: none does."""

    def fits(micro: int) -> bool:
        return Candidate(replace(run, micro=micro), cluster).fits

    if not fits(1):
        return 0
    high = 2
    while fits(high) and high < 2**20:
        high *= 2
    low = high // 2  # fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
