"""`fgpt parity`: check that every layout trains the same run; starts the ranks, or is one."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fgpt.cli.arguments import ArgumentParser, file_path
from fgpt.cli.run_flags import add_run_flags, counted, request_of, separate_steps
from fgpt.config.deepspeed.formats import read_deepspeed
from fgpt.config.resolve import Resolved
from fgpt.config.run_file import Override
from fgpt.errors import UserError
from fgpt.parity.layouts import ComparedRun, Layout, make_compared_run, parse_layout, valid_layouts

STEPS = 10
BUILT_IN: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_max_lr": "auto", "warmup_num_steps": STEPS, "warmup_type": "linear"},
    },
    "zero_optimization": {"stage": 1},
}
"""The DeepSpeed JSON without --ds_config. Clipping is active from the first step; the warm-up keeps
Adam's first steps from amplifying the rounding errors of tiny gradients."""


def parity_verb(argv: Sequence[str]) -> int:
    """Compare layouts and print the table; returns 1 if one departs. Raises FgptError."""
    arguments = _parser().parse_args(argv)
    from fgpt.distributed.launch import device_kind, world_from_environment

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
    kind = device_kind()
    os.environ.setdefault("DS_ACCELERATOR", kind)
    world = world_from_environment(os.environ)
    if "RANK" not in os.environ and world.size == 1:
        from fgpt.bench.record import must_be_writable
        from fgpt.distributed.local_ranks import gpu_count_or, run_local_ranks

        if arguments.out is not None:
            must_be_writable(arguments.out)
        n = arguments.ranks or gpu_count_or(4)
        _layouts(arguments, n, kind)  # reports wrong input once, before ranks start
        return run_local_ranks(["parity", *argv], n)
    layouts, compared_run = _layouts(arguments, world.size, kind)
    if arguments.measure:
        from fgpt.parity.plan_check import measure_all

        return measure_all(layouts, compared_run.steps, world, arguments.out)
    from fgpt.parity.rank import compare_all

    return compare_all(layouts, compared_run, world, arguments.out)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt parity",
        description="Train a few steps in several layouts, from the same weights and on the same"
        " global batches of random ids, and compare losses, gradient norms and every parameter's"
        " gradient with one process without DeepSpeed.",
        examples=["fgpt parity --layouts tp2,pp2,tp2pp2sp,zero3 --ranks 4"],
    )
    add_run_flags(parser, ds_config_required=False)
    add = parser.add_argument
    add("--layouts", default="all", metavar="NAMES", help="as in tp2,pp2,tp2pp2sp,zero3; or all")
    add(
        "--ranks",
        type=counted,
        metavar="N",
        help="ranks on this machine (default: GPUs, or 4)",
    )
    add("--precision", choices=("fp32", "bf16"), help="without --ds_config (default: fp32)")
    add(
        "--measure",
        action="store_true",
        help="instead of comparing, measure peak memory and the time of a step, beside what is"
        " predicted",
    )
    add("--out", type=file_path, metavar="FILE", help="append one JSON line for each layout")
    return parser


def _layouts(
    arguments: argparse.Namespace, n: int, device: str
) -> tuple[list[tuple[Layout, Resolved]], ComparedRun]:
    """Return the layouts to compare with their configurations. Raises ConfigError."""
    request, steps = separate_steps(request_of(arguments), STEPS)
    if request.ds_config is None:
        config = dict(BUILT_IN)
        if arguments.precision == "bf16":
            config["bf16"] = {"enabled": True}
        long_enough = Override("train.steps", 2 * STEPS, "fgpt parity")  # for the built-in warm-up
        request = replace(
            request,
            ds_config=Path("built-in.json"),
            overrides=(*request.overrides, long_enough),
        )
    elif arguments.precision is not None:
        raise UserError(
            f"--precision {arguments.precision}: {request.ds_config} sets the precision: leave the"
            " flag out"
        )
    else:
        config = read_deepspeed(request.ds_config)
    compared_run = make_compared_run(config, request, n, device, steps)
    if arguments.layouts == "all":
        found = valid_layouts(compared_run)
    else:
        layouts = [parse_layout(name) for name in arguments.layouts.split(",")]
        found = [(layout, compared_run.resolved(layout)) for layout in layouts]
    if any(resolved.run.train.init_from is not None for _, resolved in found):
        raise UserError("train.init_from: layouts are compared from initial values; leave it out")
    return found, compared_run
