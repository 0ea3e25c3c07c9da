"""Short training runs: their flags, several runs in one set of processes, their records.

tiny.flags("a", "--resume", "auto")   flags of launchers/train.py for the run in directory "a"
train_all(world, [flags, ...])        these runs one after the other; for `run_ranks`
tiny.losses("a")                      the recorded losses
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.distributed.launch import World

STEPS, EVERY = 6, 2
MODEL = ("n_layer=2", "d_model=32", "n_head=2", "vocab_size=400", "max_seq_len=32")
ADAM = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True}


@dataclass(frozen=True)
class Outcome:
    """The end of one run."""

    code: int
    """Its exit code."""
    error: str
    """The error line, or ""."""
    output: str
    """Its console output."""


@dataclass(frozen=True)
class Tiny:
    """Runs in subdirectories of `folder` on one small data set."""

    folder: Path
    data: Path

    def ds(self, name: str = "ds", **changes: Any) -> Path:
        """Write a DeepSpeed JSON: ZeRO-2, fp32, AdamW, unless changed."""
        value = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": ADAM},
            "zero_optimization": {"stage": 2},
        } | changes
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(value))
        return path

    def flags(self, run: str, *more: object, ds: Path | None = None) -> list[str]:
        """Return flags of the run in directory `run`: STEPS steps, checkpoints every EVERY."""
        fixed = [f"model.{value}" for value in MODEL]
        fixed += [f"checkpoint.every={EVERY}", "eval.every=0", "eval.batches=1", "sample.tokens=0"]
        start = ["--ds_config", ds or self.ds(), "--data", self.data, "--run_dir", self.path(run)]
        start += ["--steps", STEPS]
        return [*map(str, start), *(f"--set={value}" for value in fixed), *map(str, more)]

    def path(self, run: str) -> Path:
        """A run's directory."""
        return self.folder / run

    def records(self, run: str) -> list[dict[str, Any]]:
        """Return a run's step records in file order."""
        lines = (self.path(run) / "metrics.jsonl").read_text().splitlines()
        return [r for r in map(json.loads, lines) if "loss" in r]

    def losses(self, run: str) -> list[tuple[int, float]]:
        """Return (step, loss) of every recorded step."""
        return [(r["step"], r["loss"]) for r in self.records(run)]

    def checkpoint(self, run: str, step: int) -> Path:
        """Directory of a checkpoint."""
        return self.path(run) / "checkpoints" / f"step_{step:08d}"

    def checkpoints(self, run: str) -> list[str]:
        """Everything in a run's checkpoints directory."""
        return sorted(path.name for path in (self.path(run) / "checkpoints").iterdir())


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    """A DeepSpeed section for ZeRO `stage`."""
    return {"zero_optimization": {"stage": stage, **keys}}


def train_all(world: World, runs: Sequence[Sequence[str]]) -> list[Outcome]:
    """Train one run after the other in this process, a member of the process group."""
    return [_train_once(world, flags) for flags in runs]


def _train_once(world: World, flags: Sequence[str]) -> Outcome:
    import torch
    from rich.console import Console

    from fgpt.cli.run_flags import request_of
    from fgpt.cli.train import parser
    from fgpt.config.resolve import resolve
    from fgpt.errors import FgptError
    from fgpt.train.run import run
    from fgpt.train.startup import RunContext

    arguments = parser().parse_args(flags)
    output = io.StringIO()
    try:
        resolved = resolve(request_of(arguments), world=world.size, device="cpu")
        console = Console(file=output, width=500, quiet=not world.is_rank0)
        context = RunContext(resolved, world, torch.device("cpu"), console)
        code = run(context, arguments.resume, allow=arguments.allow)
    except FgptError as error:
        return Outcome(error.exit_code, str(error), output.getvalue())
    return Outcome(code, "", output.getvalue())
