"""One rank of `fgpt soak`: launchers/train.py that also records the samples it trains on.

    torchrun ... -m fgpt.cli.soak_rank DIR/NAME --ds_config ...    flags of launchers/train.py

writes DIR/NAME_RANK.jsonl, a line per step: step, data rank, [[sample number, hash], ...].
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fgpt.cli import train

if TYPE_CHECKING:
    from fgpt.data.loader import MicroBatches
    from fgpt.data.samples import Samples
    from fgpt.train.run import Observer


def main(argv: Sequence[str]) -> int:
    """Run one rank; returns its exit code."""
    prefix, *flags = argv
    file = f"{prefix}_{os.environ['RANK']}.jsonl"
    return train.main(flags, lambda: _observer(file))


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
