"""`fgpt resume-check` in this process, its ranks forked from the tests' server.

resume_check("--layouts", "tp2", data=..., folder=...)    the verb; `fault` changes the ranks
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from fgpt.cli import main
from tests.ranks import start_ranks
from tests.tiny import ADAM, MODEL

Fault = Callable[[], None]
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": ADAM},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.01}},
    "zero_optimization": {"stage": 2},
}


def flags(folder: Path, data: Path, *more: str) -> list[str]:
    """Return the verb's arguments for a tiny run: ZeRO-2 in fp32."""
    ds_config = folder / "ds.json"
    ds_config.write_text(json.dumps(CONFIG))
    model = [f"--set=model.{value}" for value in MODEL]
    return ["--ds_config", str(ds_config), "--data", str(data), *model, *more]


def resume_check(arguments: Sequence[str], fault: Fault | None = None) -> int:
    """Run the verb, and `fault` on each rank before it trains; returns the exit code."""

    def start(rank_arguments: Sequence[str], n: int) -> int:
        with start_ranks(_rank, n, list(rank_arguments), fault, join=False) as ranks:
            codes = ranks.wait()
            print(ranks.output(), file=sys.stderr)
        return next((code for code in codes if code), 0)

    with mock.patch("fgpt.distributed.local_ranks.run_local_ranks", start):
        return main(["resume-check", *arguments])


def _rank(world: Any, arguments: list[str], fault: Fault | None) -> None:
    if fault is not None:
        fault()
    sys.exit(main(arguments))
