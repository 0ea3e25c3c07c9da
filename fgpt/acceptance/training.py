"""Whole training runs in separate processes: resume, SIGTERM, out of memory, NaN."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from fgpt.acceptance.check import Findings

STEPS, SAVED_AT = 6, 3
ADAM = {"lr": 2e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True, "fused": True}
UNFUSED = {**ADAM, "fused": False}
RESUME_BOUND = 2e-4
"""Relative difference of a loss after a resume on a GPU, where sums have no fixed order. On a CPU
the losses with the same optimizer are equal."""
SIGTERM_S = 30.0
"""Within which a run of tiny steps must have saved and ended."""


class Training:
    """One run of launchers/train.py in a new directory, and its output."""

    def __init__(
        self,
        found: Findings,
        name: str,
        *flags: object,
        faults: tuple[object, ...] = (),
        params: Mapping[str, Any] = ADAM,
        micro: int = 4,
        **settings: object,
    ):
        """`faults`: of `fgpt.acceptance.trainer`; `settings`: run-file fields (`data__seq_len`)."""
        self.run_dir = found.work / name
        ds_config = found.work / f"{name}.json"
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": params},
            "zero_optimization": {"stage": 1},
        }
        ds_config.write_text(json.dumps(config))
        fields: dict[str, object] = {
            "model.vocab_size": 512,
            "data.seq_len": 64,
            "train.log_every": 1,
            "checkpoint.every": SAVED_AT,
            "eval.every": 0,
            "eval.batches": 1,
            "sample.tokens": 0,
            "speed.compile": "off",
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        command = ["--ds_config", ds_config, "--data", found.data, "--run_dir", self.run_dir]
        command += [f"--set={key}={value}" for key, value in fields.items()]
        self.log = found.work / f"{name}.log"
        unlaunched = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "fgpt.acceptance.trainer"),
                    *map(str, faults),
                    "--",
                    *map(str, (*command, *flags)),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in os.environ.items() if k not in unlaunched},
            )

    def wait(self) -> int:
        """Its exit code; the check's own time limit ends it, too."""
        return self.process.wait()

    def output(self) -> str:
        """Its console so far."""
        return self.log.read_text(errors="replace")

    def records(self) -> list[dict[str, Any]]:
        """The steps that it has recorded."""
        file = self.run_dir / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        complete = [json.loads(line) for line in lines if line.endswith("}")]
        return [record for record in complete if "loss" in record]

    def require_code(self, found: Findings, code: int) -> None:
        """Fail the check unless the run ended with this exit code."""
        got = self.wait()
        last = (self.output().strip().splitlines() or ["no output"])[-1]
        found.require(got == code, f"{self.run_dir.name}: exit code {got}, not {code}: {last}")


def check_resume(found: Findings) -> None:
    """Stop after 3 of 6 steps: new processes, with the fused optimizer on and off, go on alike."""
    whole = Training(found, "whole", "--steps", STEPS)
    whole.require_code(found, 0)
    wanted = [record["loss"] for record in whole.records()][SAVED_AT:]
    found.require(len(wanted) == STEPS - SAVED_AT, f"whole: {len(wanted)} steps were recorded")
    saved = whole.run_dir / "checkpoints" / f"step_{SAVED_AT:08d}"
    for name, params in (("fused", ADAM), ("unfused", UNFUSED)):
        resumed = Training(found, name, "--steps", STEPS, "--resume", saved, params=params)
        resumed.require_code(found, 0)
        losses = [record["loss"] for record in resumed.records()][-len(wanted) :]
        differences = [abs(a - b) / b for a, b in zip(losses, wanted, strict=False)]
        found.require(len(losses) == len(wanted), f"{name}: {len(losses)} steps after the resume")
        exact = name == "fused" and not found.on_gpu
        found.figure(
            f"loss after a resume, {name}",
            max(differences, default=float("nan")),
            "relative",
            at_most=0.0 if exact else RESUME_BOUND,
        )


def check_sigterm(found: Findings) -> None:
    """A run that gets SIGTERM saves its step and exits with 143."""
    run = Training(found, "run", "--steps", 100_000, checkpoint__every=0)
    while len(run.records()) < 3 and run.process.poll() is None:
        time.sleep(0.05)
    sent = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    run.require_code(found, 128 + signal.SIGTERM)
    found.figure("from SIGTERM to the end", time.monotonic() - sent, "s", at_most=SIGTERM_S)
    saved = sorted(path.name for path in (run.run_dir / "checkpoints").glob("step_*"))
    steps = [record["step"] for record in run.records()]
    newest = f"step_{steps[-1]:08d}" if steps else "a checkpoint"
    found.require(saved == [newest], f"the run left {saved}, not {newest}")


def check_out_of_memory(found: Findings) -> None:
    """One line with the remedy and exit code 1; on a CPU the address space is limited instead."""
    run = Training(
        found,
        "run",
        *("--steps", 3),
        micro=4096 if found.on_gpu else 64,
        faults=("--memory-mib", 512 if found.on_gpu else 256),
        data__seq_len=256,
    )
    run.require_code(found, 1)
    output = run.output()
    found.require("make train_micro_batch_size_per_gpu smaller" in output, "no line with a remedy")
    found.require("Traceback" not in output, "a traceback was printed")


def check_nan(found: Findings) -> None:
    """Two bad steps are skipped, then the guard ends the run, without NaN in a checkpoint."""
    run = Training(found, "run", "--steps", 50, faults=("--nan-from", 2), train__max_skipped=3)
    run.require_code(found, 1)
    found.require("3 steps in a row had non-finite" in run.output(), "the guard said nothing")
    skipped = [record["skipped"] for record in run.records()]
    found.require(
        skipped[:4] == [False, False, True, True],
        f"skipped steps: {skipped}, not from the third on",
    )
    dumps = list(run.run_dir.glob("nonfinite_step_*.json"))
    found.require(len(dumps) == 1, "the samples of the bad step were not written")
