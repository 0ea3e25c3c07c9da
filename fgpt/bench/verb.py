"""`fgpt bench`: the verb. Under torchrun it measures all ranks together."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from fgpt.config.flags import Override, RunRequest, counted
from fgpt.config.resolve import Resolved, resolve


def bench_verb(argv: Sequence[str]) -> int:
    """Measure, print tables, append JSON lines. Raises FgptError."""
    if list(argv[:1]) == ["data"]:
        from fgpt.bench.data.verb import bench_data_verb

        return bench_data_verb(argv[1:])
    arguments = _parser().parse_args(argv)
    from fgpt.bench import engines, record
    from fgpt.engine.launch import announced, device_kind, join, leave

    # DeepSpeed's calls of torch's older names
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
    world = announced(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", device_kind())
    device = join(world, os.environ)
    console = Console(quiet=not world.leads, width=None if os.isatty(1) else 120)
    try:
        if world.leads:
            record.must_be_writable(arguments.out)
        for precision in arguments.precision:
            base = engines.base_json(arguments.micro_batch)
            jsons = engines.variants(base, precision, world.size)
            resolved = {
                name: _resolve(name, config, arguments.model, world.size, device.type)
                for name, config in jsons.items()
            }
            timings, losses = engines.compare(
                resolved, world, device,
                steps=arguments.steps, warmup=arguments.warmup, rounds=arguments.rounds,
            )  # fmt: skip
            first = next(iter(resolved.values()))
            tokens = engines.tokens_per_step(first)
            title = (
                f"{arguments.model}, {precision}, {world.size} rank(s), micro-batch"
                f" {arguments.micro_batch}, {record.hardware(device)}"
            )
            engines.table(console, title, timings, losses, tokens)
            if world.leads:
                _keep(
                    arguments.out, record.environment(device), precision, resolved, timings, losses
                )
        console.print(f"records: {arguments.out}", highlight=False)
    finally:
        leave()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fgpt bench",
        description="Tokens/s of the same training step under each engine, side by side in one run."
        " One rank: plain, ZeRO 0-3. Several: torchrun --nproc-per-node N -m fgpt.cli bench."
        " `fgpt bench data` measures the data pipeline.",
    )
    add = parser.add_argument
    add("--model", default="tiny", metavar="PRESET", help="model preset (default: tiny)")
    add(
        "--micro_batch",
        "--micro-batch",
        type=counted,
        default=8,
        metavar="N",
        help="samples (8)",
    )
    add("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add("--steps", type=counted, default=4, metavar="N", help="steps in one round (default: 4)")
    add(
        "--rounds",
        type=counted,
        default=7,
        metavar="N",
        help="rounds of each engine (default: 7)",
    )
    add(
        "--warmup",
        type=counted,
        default=3,
        metavar="N",
        help="steps before the clock starts (3)",
    )
    add("--out", type=Path, default=Path("runs/bench/engines.jsonl"), metavar="FILE")
    return parser


def _resolve(name: str, config: dict[str, Any], model: str, world: int, device: str) -> Resolved:
    """The same strict reading as for training; the JSON goes through a file like a user's."""
    engine = "plain" if name == "plain" else "deepspeed"
    overrides = (
        Override("model.preset", model, "--model"),
        Override("train.engine", engine, "--set"),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.json"
        file.write_text(json.dumps(config))
        return resolve(RunRequest(file, None, overrides), world=world, device=device)


def _keep(
    out: Path,
    environment: dict[str, Any],
    precision: str,
    resolved: dict[str, Resolved],
    timings: dict[str, Any],
    losses: dict[str, float],
) -> None:
    from fgpt.bench.record import append

    base = next(iter(timings.values()))
    for name, timing in timings.items():
        append(
            out,
            {
                **environment,
                "engine": name,
                "precision": precision,
                "batch": asdict(resolved[name].batch),
                "step_s": timing.step_s,
                "relative_speed_median_low_high": timing.speed_relative_to(base),
                "loss": losses[name],
                "model": asdict(resolved[name].run.model),
                "deepspeed": resolved[name].deepspeed,
            },
        )
