"""`fgpt bench watching`: flags, and the line that it prints; starts the ranks, or is one."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgpt.cli.arguments import ArgumentParser, file_path
from fgpt.cli.run_flags import counted
from fgpt.config.presets import PRESETS
from fgpt.config.resolve import RunRequest, resolve
from fgpt.config.run_file import Override

DEEPSPEED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    "zero_optimization": {"stage": 2},
}


def bench_watching_verb(argv: Sequence[str]) -> int:
    """Measure, print a line, append a JSON line. Raises FgptError."""
    args = _parser().parse_args(argv)
    from fgpt.distributed.launch import device_kind, world_from_environment

    kind = device_kind()
    os.environ.setdefault("DS_ACCELERATOR", kind)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
    from fgpt.bench.record import append, environment, must_be_writable

    if "RANK" not in os.environ:
        from fgpt.distributed.local_ranks import run_local_ranks

        must_be_writable(args.out)
        return run_local_ranks(["bench", "watching", *argv], args.ranks)
    from fgpt.bench.watching import measure_watching
    from fgpt.distributed.local_ranks import joined_ranks

    world = world_from_environment(os.environ)
    values = {"model.preset": args.model, "data.seq_len": 128, "train.log_every": 1}
    overrides = tuple(Override(key, value, "fgpt bench") for key, value in values.items())
    request = RunRequest(Path("built-in.json"), overrides=overrides, deepspeed=DEEPSPEED)
    resolved = resolve(request, world=world.size, device=kind)
    with joined_ranks(world) as device, tempfile.TemporaryDirectory(prefix="fgpt-bench-") as folder:
        pairs = [*measure_watching(resolved, world, device, Path(folder), args.rounds, args.steps)]
        if world.is_rank0:
            ratios = sorted(watched / plain for watched, plain in pairs)
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            plain_ms = 1e3 * statistics.median(plain for _, plain in pairs)
            print(
                f"{args.model}, {world.size} ranks: a step takes {middle:.4f} x with watching"
                f" (quartiles {low:.4f} to {high:.4f}, {len(ratios)} rounds of {args.steps} steps"
                f" each, {plain_ms:.1f} ms without)"
            )
            measured = {
                "measurement": "watching",
                "row": args.model,
                "ranks": world.size,
                "steps": args.steps,
                "pairs_s": pairs,
            }
            append(args.out, {**environment(device), **measured})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt bench watching",
        description="What the watchdog, the watch of the ranks, the signal thread and guarded"
        " output cost: a step with them against one without, in turn in one run.",
        examples=["fgpt bench watching --model mini --rounds 20"],
    )
    add = parser.add_argument
    add("--model", choices=PRESETS, default="tiny", metavar="PRESET", help="default: tiny")
    add("--ranks", type=counted, default=2, metavar="N", help="on this machine (default: 2)")
    add("--rounds", type=counted, default=20, metavar="N", help="default: 20")
    add("--steps", type=counted, default=20, metavar="N", help="per round and side (default: 20)")
    add(
        "--out",
        type=file_path,
        default=Path("runs/bench/watching.jsonl"),
        metavar="FILE",
        help="records are appended here (default: runs/bench/watching.jsonl)",
    )
    return parser
