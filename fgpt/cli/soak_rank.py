"""One rank of `fgpt soak`: launchers/train.py that also records the samples it trains on.

    torchrun ... -m fgpt.cli.soak_rank DIR/NAME FLAGS              flags of launchers/train.py
    torchrun ... -m fgpt.cli.soak_rank DIR/NAME FLAGS -- FLAGS     one run after the other

writes DIR/NAME_RANK.jsonl, a line per step: step, data rank, [[sample number, hash], ...].
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fgpt.cli import train

if TYPE_CHECKING:
    from fgpt.data.loader import MicroBatches
    from fgpt.data.samples import Samples
    from fgpt.train.run import Observer


def main(argv: Sequence[str]) -> int:
    """Run one rank; returns its exit code. Raises FgptError if there are several runs."""
    prefix, *flags = argv
    file = f"{prefix}_{os.environ['RANK']}.jsonl"
    if "--" not in flags:
        return train.main(flags, lambda: _observer(file))
    _train_each([list(run) for is_end, run in groupby(flags, "--".__eq__) if not is_end], file)
    return 0


def _train_each(runs: Sequence[Sequence[str]], file: str) -> None:
    """Train one run after the other in this process: a new process takes seconds to start."""
    from rich.console import Console

    from fgpt.cli.run_flags import request_of
    from fgpt.config.resolve import resolve
    from fgpt.distributed.launch import device_kind, world_from_environment
    from fgpt.distributed.local_ranks import joined_ranks
    from fgpt.train.run import run
    from fgpt.train.startup import RunContext

    kind, world = device_kind(), world_from_environment(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", kind)
    with joined_ranks(world) as device:
        for flags in runs:
            arguments = train.parser().parse_args(flags)
            resolved = resolve(request_of(arguments), world=world.size, device=kind)
            console = Console(quiet=not world.is_rank0, soft_wrap=True)
            context = RunContext(resolved, world, device, console)
            run(context, arguments.resume, observer=_observer(file))
            gc.collect()  # DeepSpeed's objects form cycles, which keep process groups alive


def _observer(file: str) -> Observer:
    from fgpt.parity.resume_rank import RecordedBatches
    from fgpt.train.run import Observer

    def make_batches(samples: Samples, **options: Any) -> MicroBatches:
        def write(step: int, rows: list[tuple[int, str]]) -> None:
            line = json.dumps([step + 1, options["dp_rank"], rows])
            with open(file, "a") as opened:  # flushed: the process may be killed in this step
                opened.write(line + "\n")

        return RecordedBatches(samples, write, **options)

    return Observer(make_batches)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
