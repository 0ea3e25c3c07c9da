"""What watching a run costs: the same engine's steps with and without it, in turn.

With: the watchdog's and the signals' threads, the watch of the local ranks, console output through
`SafeStream`, and the guarded metrics file, as in a run. Without: none of these; the same console
line is written to a plain stream, and the same record to a plain file.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fgpt.config.resolve import Resolved
from fgpt.distributed.agreements import any_rank
from fgpt.distributed.launch import World
from fgpt.distributed.progress import DATA, STEP, Progress
from fgpt.engine.base import Engine
from fgpt.engine.build import build_engine
from fgpt.parity.trace import micro_batches
from fgpt.train.failure import FailureReport
from fgpt.train.loop import StepEvent
from fgpt.train.metrics import Metrics
from fgpt.train.run import watch_progress
from fgpt.train.startup import RunContext
from fgpt.train.stop_signals import StopSignals
from fgpt.utils.console import SafeStream

WARMUP_STEPS = 3


def measure_watching(
    resolved: Resolved, world: World, device: torch.device, folder: Path, rounds: int, steps: int
) -> Iterator[tuple[float, float]]:
    """Yield (median seconds of a step with watching, without) of each round of `steps` steps each.

    All ranks call this. `folder` is theirs. Which of the two comes first alternates.
    """
    engine = build_engine(resolved, world, device)
    context = RunContext(resolved, world, device, Console(quiet=True))
    bench = _Bench(engine, context, folder)
    bench.steps(WARMUP_STEPS, Progress(), lambda event: None)
    for number in range(rounds):
        sides = (bench.watched, bench.plain)
        times = [side(steps) for side in (sides if number % 2 else sides[::-1])]
        watched, plain = times if number % 2 else times[::-1]
        yield watched, plain
    engine.close()


class _Bench:
    def __init__(self, engine: Engine, context: RunContext, folder: Path):
        self.engine, self.context, self.folder = engine, context, folder

    def watched(self, steps: int) -> float:
        """Median seconds of a step with everything that watches a run."""
        context = self.context
        with ExitStack() as stack:
            report = FailureReport(context.world, Progress(), exits=True)
            watch_progress(context, report, stack)
            train = context.resolved.run.train
            stop = StopSignals(context.device, report.progress, train.grace_s, report.end)
            stack.callback(stop.close)
            stream: Any = SafeStream(stack.enter_context(open(os.devnull, "w")))
            metrics = Metrics(
                context.resolved,
                self.engine,
                self.folder / f"metrics_{context.world.rank}.jsonl",
                Console(file=stream, quiet=not context.world.is_rank0),
                context.device,
                0,
            )
            stack.callback(metrics.close)
            return self.steps(steps, report.progress, metrics, stop)

    def plain(self, steps: int) -> float:
        """Median seconds of a step without."""
        with (
            open(os.devnull, "w") as null,
            open(self.folder / f"plain_{self.context.world.rank}.jsonl", "a") as file,
        ):
            console = Console(file=null, quiet=not self.context.world.is_rank0)

            def write(event: StepEvent) -> None:
                file.write(json.dumps({"step": event.step, **vars(event.result)}) + "\n")
                file.flush()
                console.print(f"step {event.step}  loss {event.result.loss:.4f}", highlight=False)

            # the ranks agree on signals in a step of a run in any case
            return self.steps(
                steps, Progress(), write, lambda: any_rank(False, self.context.device)
            )

    def steps(
        self,
        n: int,
        progress: Progress,
        hook: Callable[[StepEvent], None],
        agree: Callable[[], object] = lambda: None,
    ) -> float:
        """Train; returns the median seconds of a step."""
        times = []
        for _ in range(n):
            batches = micro_batches(
                self.context.resolved, self.context.world.rank, self.engine.step
            )
            t0 = time.perf_counter()
            progress.enter(DATA, self.engine.step)
            progress.enter(STEP)
            result = self.engine.train_batch(batches).result()
            elapsed_s = time.perf_counter() - t0
            with contextlib.suppress(OSError):
                hook(StepEvent(self.engine.step, result, elapsed_s, 0.0))
            agree()
            times.append(time.perf_counter() - t0)
        return statistics.median(times)
