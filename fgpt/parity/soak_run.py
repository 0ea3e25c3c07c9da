"""What `fgpt soak` trains, how the launcher is started, and the clean run.

DIR/ds_LAYOUT.json         DeepSpeed's configuration of a layout
DIR/faulty, DIR/clean      run directories
DIR/samples/               what the ranks read, a file per start and rank
DIR/logs/                  the output of each start
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fgpt.distributed.launch import available_cores
from fgpt.errors import TrainingError
from fgpt.parity.layouts import parse_layout
from fgpt.parity.soak_faults import PlannedFault
from fgpt.utils.fault_injection import VARIABLE
from fgpt.utils.process_tree import ProcessTree

SAVE_EVERY = 4
GLOBAL_BATCH = 4
WATCHDOG_S = 6
"""train.watchdog_s: saves and the first step have 6 times as long."""
VOCABULARY = 400
"""Ids of the model, the most that the data may have."""
FIELDS = {
    "model.n_layer": 2,
    "model.d_model": 32,
    "model.n_head": 2,
    "model.vocab_size": VOCABULARY,
    "model.max_seq_len": 32,
    "model.dropout": 0.1,
    "checkpoint.every": SAVE_EVERY,
    "eval.every": 0,
    "eval.batches": 1,
    "sample.tokens": 0,
    "train.log_every": 1,
    "train.watchdog_s": WATCHDOG_S,
    "train.grace_s": 30,
}
"""The run file of both runs."""


@dataclass(frozen=True)
class Soak:
    """What is trained, and what happens to it."""

    folder: Path
    data: Path
    ranks: int
    steps: int
    faults: Sequence[PlannedFault]
    layouts: Sequence[str]
    """The layout of each start."""
    limit_s: float
    """Time after which no further fault is planned."""


@dataclass
class Outcome:
    """A fault, and what came of it."""

    fault: str
    layout: str
    step: int = 0
    """The last finished step."""
    time: float = 0.0
    """When it happened, in seconds since 1970."""
    gone_s: float | None = None
    """Until the last process of the run was gone; None: the run went on."""
    outlived_s: float | None = None
    """The part of it after the launcher's end."""
    resumed_step: int | None = None
    """The step that the next start continued from."""
    recovery_s: float | None = None
    """From the fault to the end of the first step after it."""
    problem: str = ""
    """What should not have happened."""

    @property
    def lost_steps(self) -> int:
        """Finished steps that were trained again."""
        return max(0, self.step - (self.step if self.resumed_step is None else self.resumed_step))


@dataclass(frozen=True)
class Segment:
    """Steps of the finished run that one layout has trained."""

    layout: str
    begin: int
    """Steps done before the first of them."""


@dataclass
class SoakRecord:
    """Everything that happened to the faulty run."""

    outcomes: list[Outcome] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    starts: int = 0
    wall_s: float = 0.0
    useful_s: float = 0.0
    """Time of the steps of the finished run."""

    def add_segment(self, segment: Segment) -> None:
        """A start has continued from `segment.begin`: what was trained beyond is discarded."""
        kept = [s for s in self.segments if s.begin < segment.begin]
        same = kept and kept[-1].layout == segment.layout
        self.segments = kept if same else [*kept, segment]


class Trainer:
    """Starts the launcher."""

    def __init__(self, soak: Soak):
        """Writes the JSONs of the layouts."""
        self.soak = soak
        for name in ("logs", "samples"):
            (soak.folder / name).mkdir()
        for layout in set(soak.layouts):
            stage = parse_layout(layout).stage
            self._ds_config(layout).write_text(json.dumps(_deepspeed_json(stage or 0)))

    def start(
        self,
        run: str,
        number: int,
        segments: Sequence[tuple[str, int]],
        planned_faults: str = "",
    ) -> ProcessTree:
        """Start the launcher for start `number` of a run: up to each step in its layout."""
        soak, name = self.soak, f"{run}_{number:03d}"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(soak.ranks)]
        command = [*torchrun, "-m", "fgpt.cli.soak_rank", str(soak.folder / "samples" / name)]
        for i, (layout, steps) in enumerate(segments):
            command += [*["--"] * (i > 0), *self._flags(run, layout, steps)]
        environment = {"OMP_NUM_THREADS": str(max(1, available_cores() // soak.ranks))}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        if planned_faults:
            environment[VARIABLE] = planned_faults
        return ProcessTree(command, environment, self.log(run, number))

    def _flags(self, run: str, layout: str, steps: int) -> list[str]:
        """The trainer's flags."""
        axes = parse_layout(layout)
        flags = ["--ds_config", str(self._ds_config(layout)), "--data", str(self.soak.data)]
        flags += ["--run_dir", str(self.run_dir(run)), "--steps", str(steps), "--resume", "auto"]
        flags += [f"--tp={axes.tp}", f"--pp={axes.pp}", f"--cp={axes.cp}"]
        return [*flags, *(f"--set={key}={json.dumps(value)}" for key, value in FIELDS.items())]

    def run_dir(self, run: str) -> Path:
        """Return the directory of a run."""
        return self.soak.folder / run

    def log(self, run: str, number: int) -> Path:
        """Return the file with the output of a start."""
        return self.soak.folder / "logs" / f"{run}_{number:03d}.txt"

    def _ds_config(self, layout: str) -> Path:
        return self.soak.folder / f"ds_{layout}.json"


def _deepspeed_json(stage: int) -> dict[str, object]:
    adam = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True}
    # without a decay: the clean run may end earlier than it, and go on
    warmup = {"warmup_num_steps": 20, "warmup_max_lr": 0.01}
    return {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": adam},
        "scheduler": {"type": "WarmupLR", "params": warmup},
        "zero_optimization": {"stage": stage},
    }


def train_clean(soak: Soak, trainer: Trainer, segments: Sequence[Segment]) -> None:
    """Train the same steps in the same layouts without faults, in one start of the launcher.

    Raises TrainingError.
    """
    ends = [*(segment.begin for segment in segments[1:]), soak.steps]
    layouts = [segment.layout for segment in segments]
    tree = trainer.start("clean", 0, list(zip(layouts, ends, strict=True)))
    try:
        while (code := tree.wait(1.0)) is None:
            pass
    finally:
        tree.kill()
    if code:
        log = trainer.log("clean", 0).read_text()
        raise TrainingError(f"the clean run ended with exit code {code}:\n{log[-3000:]}")
