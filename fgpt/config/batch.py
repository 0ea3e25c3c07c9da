"""Batch arithmetic: world = tp x pp x cp x dp; global = micro x accumulation x dp."""

from __future__ import annotations

from dataclasses import dataclass

from fgpt.config.field_syntax import parse_ramp

GLOBAL = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


class BatchError(ValueError):
    """The batch sizes and the grid contradict each other."""

    def __init__(self, what: str, fix: str, nearest: dict[str, int]):
        super().__init__(what)
        self.what = what
        """The contradiction, with all numbers."""
        self.fix = fix
        """The nearest valid choices, in words."""
        self.nearest = nearest
        """The first of them: the DeepSpeed JSON's keys -> numbers."""


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


@dataclass(frozen=True)
class BatchRamp:
    """The global batch of every step of a run, which may grow over its first steps."""

    parts: tuple[tuple[int, int], ...]
    """(first step, samples per step) of each part, ascending; the first part begins at step 0."""

    @classmethod
    def of(cls, text: str | None, batch: Batch) -> BatchRamp:
        """Return that of a valid `train.batch_ramp`; None: the global batch in every step."""
        return cls(((0, batch.global_size),) if text is None else tuple(parse_ramp(text)))

    def size_at(self, step: int) -> int:
        """Return the samples of a step (the first one is 0)."""
        return next(size for begin, size in reversed(self.parts) if begin <= step)

    def samples_before(self, step: int) -> int:
        """Return the samples of all steps before this one."""
        ends = (*(begin for begin, _ in self.parts[1:]), step)
        return sum(
            (min(end, step) - begin) * size
            for (begin, size), end in zip(self.parts, ends, strict=True)
            if begin < step
        )

    def steps_for(self, samples: int) -> int:
        """Return the fewest steps with at least so many samples."""
        begin, size = next(
            part for part in reversed(self.parts) if self.samples_before(part[0]) < samples
        )
        return begin - (self.samples_before(begin) - samples) // size

    def explain(self) -> str:
        """Return "64 from step 0, 128 from step 100": steps counted from 0."""
        return ", ".join(f"{size} from step {begin}" for begin, size in self.parts)


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
    must be a multiple of tp x pp x cp. `global_size` or `micro` must be given.
    """
    dp = world // (tp * pp * cp)
    written = micro, accumulation
    if micro is None:
        assert global_size is not None
        accumulation = accumulation or 1
        micro = max(1, global_size // (accumulation * dp))
    elif accumulation is None:
        accumulation = 1 if global_size is None else max(1, global_size // (micro * dp))
    total = micro * accumulation * dp
    if global_size is not None and global_size != total:
        raise _contradiction(
            global_size, written, micro, accumulation, Batch(0, 0, 0, world, tp, pp, cp, dp)
        )
    return Batch(micro, accumulation, total, world, tp, pp, cp, dp)


def _contradiction(
    global_size: int,
    written: tuple[int | None, int | None],
    micro: int,
    accumulation: int,
    grid: Batch,
) -> BatchError:
    dp = grid.dp
    micro_text, accumulation_text = (
        f"{name} {number}" + ("" if given else " (not written)")
        for name, number, given in zip(
            (MICRO, ACCUMULATION), (micro, accumulation), written, strict=True
        )
    )
    what = (
        f"{GLOBAL} {global_size} is not {micro_text} x {accumulation_text} x dp {dp} "
        f"= {micro * accumulation * dp} ({grid.grid}; global = micro x accumulation x dp)"
    )
    choices = _nearest(global_size, micro, accumulation, dp, None not in written)
    named = (" with ".join(f"{name} {n}" for name, n in choice.items()) for choice in choices)
    fix = f"nearest: {'; or '.join(named)}"
    if worlds := _worlds(global_size, *written, grid.world // dp):
        fix += f"; or start {worlds} process{'' if worlds == '1' else 'es'}"
    return BatchError(what, fix, choices[0])


def _nearest(
    global_size: int, micro: int, accumulation: int, dp: int, both_written: bool
) -> list[dict[str, int]]:
    """Valid choices that keep most of the written numbers.

    `both_written`: micro and accumulation are, and leave one choice of the global size.
    """
    choices = []
    if global_size % dp == 0:
        per_rank = global_size // dp
        if per_rank % micro == 0:
            choices.append({ACCUMULATION: per_rank // micro})
        if per_rank % accumulation == 0:
            choices.append({MICRO: per_rank // accumulation})
        if not choices:
            best = min(_divisors(per_rank), key=lambda d: (abs(d - micro), d))
            choices.append({MICRO: best, ACCUMULATION: per_rank // best})
    step = micro * accumulation * dp
    below, above = global_size // step * step, -(-global_size // step) * step
    near = {step} if both_written else {below, above}
    totals = sorted((t for t in near if t > 0), key=lambda t: (abs(t - global_size), t))
    return choices + [{GLOBAL: total} for total in totals]


_MOST_WORLDS = 12


def _worlds(global_size: int, micro: int | None, accumulation: int | None, ranks: int) -> str:
    """The numbers of processes that the written sizes fit, in words; empty: none.

    `ranks`: processes for each data-parallel rank.
    """
    step = (micro or 1) * (accumulation or 1)
    if global_size % step:
        return ""
    sizes = sorted(d * ranks for d in _divisors(global_size // step))
    if micro is not None and accumulation is not None:
        sizes = [global_size // step * ranks]
    more = " or more" if len(sizes) > _MOST_WORLDS else ""
    *first, last = map(str, dict.fromkeys(sizes[:_MOST_WORLDS]))
    return (", ".join(first) + " or " if first else "") + last + more


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return small + [n // d for d in small]
