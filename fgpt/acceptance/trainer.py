"""`launchers/train.py` in one process, with a planted fault: the training checks start it.

python -m fgpt.acceptance.trainer [--nan-from STEP] [--memory-mib N] -- FLAGS
"""

from __future__ import annotations

import argparse
import resource
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from fgpt.data.loader import MicroBatch, MicroBatches
from fgpt.model.gpt import GPT
from fgpt.utils.process import signal_on_parent_death

TRAIN = Path(__file__).parents[2] / "launchers/train.py"


def main() -> None:
    """Plant the faults and become the trainer. Does not return."""
    signal_on_parent_death(signal.SIGKILL)
    split = sys.argv.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--nan-from", type=int)
    parser.add_argument("--memory-mib", type=int)
    arguments = parser.parse_args(sys.argv[1:split])
    if arguments.nan_from is not None:
        plant_nan(arguments.nan_from)
    if arguments.memory_mib is not None:
        limit_memory(arguments.memory_mib * 2**20)
    sys.argv = [str(TRAIN), *sys.argv[split + 1 :]]
    runpy.run_path(str(TRAIN), run_name="__main__")


def plant_nan(first_step: int) -> None:
    """Make every training loss NaN from this step on, counted from 0."""
    at, forward = MicroBatches.at, GPT.forward
    bad = False

    def at_step(self: MicroBatches, step: int) -> list[MicroBatch]:
        nonlocal bad
        bad = step >= first_step
        return at(self, step)

    def poisoned(self: GPT, *arguments: Any) -> torch.Tensor:
        output = forward(self, *arguments)
        return output * torch.nan if bad and self.training else output

    # the classes themselves: the trainer makes the instances
    MicroBatches.at = at_step  # type: ignore[method-assign]
    GPT.forward = poisoned  # type: ignore[method-assign,assignment]


def limit_memory(limit_bytes: int) -> None:
    """Limit this process's memory: the GPU's at once, without a GPU the host's from step 1 on."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(limit_bytes / total)
        return
    at = MicroBatches.at

    def at_step(self: MicroBatches, step: int) -> list[MicroBatch]:
        batches = at(self, step)
        if step == 0:  # everything is imported, and the weights are there
            size = psutil.Process().memory_info().vms + limit_bytes
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        return batches

    MicroBatches.at = at_step  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
