"""What a check of the acceptance run finds: figures with bounds, failures, and what was not run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

NEEDS_GPU = "not run: needs a GPU"


class Check(NamedTuple):
    """One line of the report, found by one process."""

    name: str
    function: str
    """MODULE:NAME, the module within `fgpt.acceptance`; called with `Findings`."""
    limit_s: float
    """Seconds after which its processes are killed."""
    what: str
    """For --list."""
    cpu_stand_in: bool = True
    """Whether a CPU runs it, too, with the CPU's own code in the kernels' place."""


@dataclass
class Findings:
    """Collects what a check finds; every bound that is exceeded is a failure."""

    device_kind: str
    """cpu or cuda."""
    work: Path
    """A directory for its files, empty at the start."""
    data: Path
    """A small prepared data set, for training runs."""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device_kind == "cuda"

    @property
    def device(self) -> torch.device:
        """This process's: the CPU, or the first visible GPU."""
        import torch  # not needed by checks that start other processes

        return torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")

    def figure(self, name: str, value: float, unit: str, at_most: float | None = None) -> None:
        """Record a figure; it fails if it exceeds `at_most` or is NaN."""
        kept = value if math.isfinite(value) else str(value)  # JSON has no NaN
        self.figures[name] = {"value": kept, "unit": unit}
        if at_most is None:
            return
        self.figures[name]["at_most"] = at_most
        self.require(value <= at_most, f"{name}: {value:.3g} {unit}, at most {at_most:.3g}")

    def require(self, condition: bool, failure: str) -> None:
        """Record `failure` unless the condition holds."""
        if not condition:
            self.failures.append(failure)

    def skip(self, part: str, reason: str = NEEDS_GPU) -> None:
        """Record that a part of the check is not run."""
        self.not_run[part] = reason

    def line(self) -> dict[str, Any]:
        """The check's part of its line of the report."""
        error = "; ".join(self.failures) or None
        return {
            "ok": error is None,
            "figures": self.figures,
            "not_run": self.not_run,
            "error": error,
        }


CHECKS = (
    Check("machine", "machine:check_machine", 60, "versions, matrix products, memory copies"),
    Check("attention", "kernels:check_attention", 90,
          "flash, cuDNN and memory-efficient attention, GQA, against the reference"),
    Check("masks", "kernels:check_masks", 90, "document masks and sliding windows"),
    Check("dropout", "kernels:check_dropout", 120, "the dropout attention kernel"),
    Check("head-loss", "kernels:check_head_loss", 120,
          "the fused head's compiled loss against the formula"),
    Check("engines-fp32", "engines:check_fp32", 120, "ZeRO 0-3 against the CPU's plain engine"),
    Check("engines-bf16", "engines:check_bf16", 120, "the same in bf16"),
    Check("engines-fp16", "engines:check_fp16", 120, "the same in fp16", cpu_stand_in=False),
    Check("fp8", "engines:check_fp8", 90, "fp8 projections learn as bf16 ones"),
    Check("optimizers", "engines:check_optimizers", 120, "muP, and Muon"),
    Check("deepspeed-adams", "engines:check_deepspeed_adams", 180,
          "DeepSpeedCPUAdam and FusedAdam, with muP"),
    Check("compiled", "compiled:check_compiled", 150, "compiled blocks, and CUDA graphs"),
    Check("generation", "generation:check_generation", 120,
          "greedy tokens equal to the CPU's, eager, compiled and with CUDA graphs"),
    Check("resume", "training:check_resume", 180,
          "save, and resume in a new process; fused optimizer on and off"),
    Check("sigterm", "training:check_sigterm", 120, "SIGTERM saves, exit code 143"),
    Check("out-of-memory", "training:check_out_of_memory", 120, "one clean line, exit code 1"),
    Check("nan", "training:check_nan", 120, "a NaN is skipped; a run of them ends the run"),
    Check("speed", "speed:check_speed", 300, "the gpt2 row of bench-single beside its peers"),
)  # fmt: skip
