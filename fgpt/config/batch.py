"""Batch arithmetic: world = tp x pp x cp x dp; global = micro x accumulation x dp."""

from __future__ import annotations

from dataclasses import dataclass

GLOBAL = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


class BatchError(ValueError):
    """The batch sizes and the grid contradict each other."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what = what
        """The contradiction, with all numbers."""
        self.fix = fix
        """The nearest legal choices."""


@dataclass(frozen=True)
class Batch:
    """The samples of one optimizer step, and the grid of ranks."""

    micro: int
    """Samples per forward pass and data-parallel rank (train_micro_batch_size_per_gpu)."""
    accumulation: int
    """Micro batches per optimizer step (gradient_accumulation_steps)."""
    global_size: int
    """Samples per optimizer step on all ranks (train_batch_size)."""
    world: int
    """Processes."""
    tp: int
    """Tensor-parallel ranks."""
    pp: int
    """Pipeline stages."""
    cp: int
    """Context-parallel ranks."""
    dp: int
    """Data-parallel ranks, each reading its own samples."""

    @property
    def grid(self) -> str:
        """The grid as text; cp is left out where it is 1."""
        context = f" x cp {self.cp}" if self.cp > 1 else ""
        return f"world {self.world} = tp {self.tp} x pp {self.pp}{context} x dp {self.dp}"

    @property
    def accumulates_gradients(self) -> bool:
        """Whether a parameter's gradient is a sum over micro-batches, replicas or stages."""
        return self.accumulation * self.dp * self.cp * self.pp > 1

    def explain(self) -> str:
        """Return the arithmetic as one sentence."""
        return (
            f"{self.grid}; global batch {self.global_size} = micro {self.micro} x accumulation "
            f"{self.accumulation} x dp {self.dp}"
        )


def solve(
    *,
    global_size: int | None,
    micro: int | None,
    accumulation: int | None,
    world: int,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
) -> Batch:
    """Complete the batch triple; None is derived. Raises BatchError for a contradiction.

    As in DeepSpeed, accumulation is 1 unless it is given or follows from the other two. `world`
    must be a multiple of tp x pp x cp.
    """
    dp = world // (tp * pp * cp)
    if global_size is None and micro is None:
        raise BatchError(
            f"neither {GLOBAL} nor {MICRO} is a number",
            f'write "{MICRO}": 8, the samples of one forward pass',
        )
    if micro is None:
        assert global_size is not None
        accumulation = accumulation or 1
        micro = max(1, global_size // (accumulation * dp))
    elif accumulation is None:
        accumulation = 1 if global_size is None else max(1, global_size // (micro * dp))
    total = micro * accumulation * dp
    if global_size is not None and global_size != total:
        raise _contradiction(
            global_size, micro, accumulation, Batch(0, 0, 0, world, tp, pp, cp, dp)
        )
    return Batch(micro, accumulation, total, world, tp, pp, cp, dp)


def _contradiction(global_size: int, micro: int, accumulation: int, grid: Batch) -> BatchError:
    dp = grid.dp
    what = (
        f"{GLOBAL} {global_size} is not {MICRO} {micro} x {ACCUMULATION} {accumulation} x dp {dp} "
        f"= {micro * accumulation * dp} ({grid.grid}; global = micro x accumulation x dp)"
    )
    return BatchError(
        what, "nearest: " + "; or ".join(_nearest(global_size, micro, accumulation, dp))
    )


def _nearest(global_size: int, micro: int, accumulation: int, dp: int) -> list[str]:
    """Valid choices that keep most of the written numbers."""
    choices = []
    if global_size % dp == 0:
        per_rank = global_size // dp
        if per_rank % micro == 0:
            choices.append(f"{ACCUMULATION} {per_rank // micro}")
        if per_rank % accumulation == 0:
            choices.append(f"{MICRO} {per_rank // accumulation}")
        if not choices:
            best = min(_divisors(per_rank), key=lambda d: (abs(d - micro), d))
            choices.append(f"{MICRO} {best} with {ACCUMULATION} {per_rank // best}")
    step = micro * accumulation * dp
    below, above = global_size // step * step, -(-global_size // step) * step
    totals = sorted({total for total in (below, above) if total > 0})
    choices.append(f"{GLOBAL} " + " or ".join(str(total) for total in totals))
    return choices


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return small + [n // d for d in small]
