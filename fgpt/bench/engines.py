"""What an engine costs: the same model, batches and precision under each, in one run.

One rank: the plain engine (no DeepSpeed) against ZeRO 0-3. Several ranks: ZeRO 0-3 against ZeRO 0.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fgpt.bench.measure import Timing, interleave
from fgpt.config.batch import MICRO
from fgpt.config.resolve import Resolved
from fgpt.data.loader import MicroBatch
from fgpt.engine.base import Engine
from fgpt.engine.build import build_engine
from fgpt.engine.launch import World

_BUCKET = 50_000_000
# elements, as in ds_configs/: DeepSpeed's default of 5e8 is 2 GB per engine
BUCKETS: dict[int, dict[str, int]] = {
    0: {},
    1: {"reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET},
    2: {"reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET},
    3: {"reduce_bucket_size": _BUCKET},
}


def variants(base: dict[str, Any], precision: str, world_size: int) -> dict[str, dict[str, Any]]:
    """Name -> DeepSpeed JSON of every engine that this precision and world can compare.

    The first one is what the others are compared with.
    """
    # DeepSpeed's half precision without ZeRO is refused (rule half-precision-zero-0)
    stages = range(0 if precision == "fp32" else 1, 4)
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        config = copy.deepcopy(base)
        config["zero_optimization"] = {"stage": stage, **BUCKETS[stage]}
        if precision == "bf16":
            config["bf16"] = {"enabled": True}
        found[f"ZeRO-{stage}"] = config
    if world_size == 1:
        plain = copy.deepcopy(found["ZeRO-1"])
        del plain["zero_optimization"]
        return {"plain": plain, **found}
    return found


def random_steps(resolved: Resolved, rank: int, n_steps: int) -> list[list[MicroBatch]]:
    """This rank's micro-batches of random ids: what they are does not change what a step costs."""
    run, batch = resolved.run, resolved.batch
    generator = torch.Generator().manual_seed(rank)
    size = (batch.micro, resolved.seq_len + 1)

    def micro_batch() -> MicroBatch:
        ids = torch.randint(0, run.model.vocab_size, size, generator=generator)
        return MicroBatch(ids[:, :-1], ids[:, 1:])

    return [[micro_batch() for _ in range(batch.accumulation)] for _ in range(n_steps)]


def compare(
    resolved: dict[str, Resolved],
    world: World,
    device: torch.device,
    *,
    steps: int,
    warmup: int,
    rounds: int,
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Build every engine and time them in turn; all ranks call this."""
    engines: dict[str, Engine] = {}
    try:
        for name, one in resolved.items():
            engines[name] = build_engine(one, world, device)
        first = next(iter(resolved.values()))
        batches = random_steps(first, world.rank, steps)
        return interleave(engines, batches, warmup=warmup, rounds=rounds, device=device)
    finally:
        for engine in engines.values():
            engine.close()


def tokens_per_step(resolved: Resolved) -> int:
    """Tokens of one global batch."""
    return resolved.batch.global_ * resolved.seq_len


def table(
    console: Console, title: str, timings: dict[str, Timing], losses: dict[str, float], tokens: int
) -> None:
    """Print one comparison; the first engine is the measure of the others."""
    names = list(timings)
    base = timings[names[0]]
    shown = Table(title=title, title_justify="left")
    for column in ("engine", "ms/step", "fastest - slowest round", "tokens/s", f"x {names[0]}", ""):
        shown.add_column(column, justify="left" if column == "engine" else "right")
    shown.add_column("loss")
    for name in names:
        low, high = timings[name].spread()
        middle, worst, best = timings[name].speed_relative_to(base)
        shown.add_row(
            name,
            f"{timings[name].median_s * 1e3:.1f}",
            f"{low * 1e3:.1f} - {high * 1e3:.1f}",
            f"{tokens / timings[name].median_s:,.0f}",
            f"{middle:.3f}",
            f"({worst:.3f} - {best:.3f})",
            f"{losses[name]:.6f}",
        )
    console.print(shown)


def base_json(micro: int) -> dict[str, Any]:
    """AdamW, a constant rate, clipping on: the least a real run has."""
    return {
        MICRO: micro,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-4, "weight_decay": 0.1, "torch_adam": True, "fused": True},
        },
    }
