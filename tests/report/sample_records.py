"""Handmade records as `fgpt bench` writes them, with values that are easy to check."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CPU = "AMD EPYC, 2 cores"
GPU = "NVIDIA H100 80GB HBM3"
LADDER = (
    "base",
    "deepspeed",
    "matrix products",
    "bf16",
    "fused attention",
    "compiled",
    "fused optimizer",
    "fused cross entropy",
    "selective recomputation",
    "CUDA graphs",
    "fp8",
    "best",
)
PARAMETERS = {"seed-1m": 871_040, "seed-9m": 9_200_000, "seed-71m": 71_000_000}


def record(**changes: Any) -> dict[str, Any]:
    """One measured variant: 4 batches of 32 in 0.5 s, so 256 samples/s; `changes` replace keys."""
    values = {
        "format": 1,
        "bench": "single",
        "row": "seed-1m",
        "env_name": "base",
        "adds": "what the published tables were measured with",
        "section": "ladder",
        "order": [0, 0],
        "reference": "base",
        "state": "measured",
        "why": None,
        "parameters": 871_040,
        "ranks": 1,
        "grid": "tp 1 x pp 1 x cp 1 x dp 1",
        "micro_batch": 32,
        "global_batch": 32,
        "seq_len": 128,
        "precision": "fp32",
        "train": {"round_s": [0.5, 0.4, 0.64], "batches": 4},
        "predict": {"round_s": [0.125, 0.25, 0.25], "batches": 8},
        "ratio": {"train": [1.0, 1.0, 1.0], "predict": [1.0, 1.0, 1.0]},
        "ratio_memory": 1.0,
        "memory": {
            "peak_bytes": 3 * 2**28,
            "reserved_bytes": None,
            "what": "resident above the libraries",
            "per_rank_bytes": [3 * 2**28],
        },
        "losses": [4.17, 4.15],
        "loss_departure": 0.0,
        "loss_bound": 1e-4,
        "flops_per_token": 5_000_000,
        "peak_tflops": 0.8,
        "peak_source": "largest of 3 square matrix products measured here",
        "setup_s": 4.2,
        "shares": None,
        "sent_bytes": None,
        "trace": None,
        "environment": environment(CPU),
        "config": {},
    }
    return {**values, **changes}


def environment(hardware: str) -> dict[str, Any]:
    """The environment of a record."""
    return {
        "time_utc": "2026-11-23T15:00:00Z",
        "command": ["fgpt", "bench", "single"],
        "commit": "0123456789abcdef",
        "uncommitted_changes": False,
        "hardware": hardware,
        "threads": 2,
        "python": "3.11.7",
        "versions": {"torch": "2.13.0+cpu"},
    }


def without(state: str, why: str, **changes: Any) -> dict[str, Any]:
    """A variant without measurements."""
    whole = record(**changes)
    kept = ("format", "bench", "row", "env_name", "adds", "section", "order", "reference")
    return {**{key: whole[key] for key in kept}, "state": state, "why": why}


def faster(times: float, **changes: Any) -> dict[str, Any]:
    """A variant that trains `times` times as fast as `record()`, in half the memory."""
    return record(
        **{
            "train": {"round_s": [0.5 / times, 0.45 / times, 0.6 / times], "batches": 4},
            "predict": {"round_s": [0.25 / times] * 3, "batches": 8},
            "ratio": {
                "train": [times, 0.9 * times, 1.1 * times],
                "predict": [times, times, times],
            },
            "ratio_memory": 0.5,
            "loss_departure": 1.2e-7,
        }
        | changes
    )


def single(hardware: str = CPU) -> list[dict[str, Any]]:
    """Three workloads of twelve variants, a memory section, and every state."""
    made = []
    for number, (row, parameters) in enumerate(PARAMETERS.items()):
        common = {"row": row, "parameters": parameters, "environment": environment(hardware)}
        for i, variant in enumerate(LADDER):
            place = {
                "env_name": variant,
                "order": [number, i],
                "adds": f"{variant} and nothing else",
            }
            if variant in ("compiled", "CUDA graphs"):
                made.append(without("skipped", "no GPU", row=row, **place))
            elif variant == "fp8":
                why = "its losses depart by 2.0e-01, bound 1e-02"
                wrong = {"state": "wrong", "why": why, "loss_departure": 0.2}
                made.append(faster(5.0, **common, **place, **wrong))
            else:
                trace = {"matrix products": 0.5, "attention": 0.3, "idle": 0.1} if i > 9 else None
                times = 1 + 0.25 * i * (1 + number)
                made.append(faster(times, **common, **place, trace=trace) if i else record(
                    **common, **place))  # fmt: skip
        memory = {"section": "memory", "env_name": "ZeRO-2 offload", "order": [number, 12]}
        made.append(faster(0.8, **common, **memory, ratio_memory=0.25))
        out = {"section": "memory", "env_name": "ZeRO-3", "order": [number, 13]}
        made.append(without("failed", "out of memory", row=row, **out))
    return made


def multi(hardware: str = CPU, ratios: Iterable[float] = (0.9, 0.8)) -> list[dict[str, Any]]:
    """One layout, and strong and weak scaling over 2 and 4 ranks."""
    common = {"bench": "multi", "reference": "1 rank", "environment": environment(hardware)}
    shared = {
        "shares": {"compute": 0.8, "communication": 0.15, "pipeline": 0.03, "data": 0.02},
        "sent_bytes": {"data": 38_500_000, "tensor": 0, "pipe": 6_290_000},
    }
    made = [record(**common, section="layouts", env_name="1 rank", order=[0, 0])]
    layout = {"section": "layouts", "env_name": "tp 2 x pp 2", "order": [0, 1], "predict": None}
    layout |= {"ranks": 4, "grid": "tp 2 x pp 2 x cp 1 x dp 1"}
    made.append(faster(0.7, **common, **shared, **layout))
    for section, number in (("strong", 1), ("weak", 2)):
        for i, (n, ratio) in enumerate(zip((2, 4), ratios, strict=True)):
            name = f"{n} ranks" if section == "strong" else f"{n} ranks, weak"
            place = {"section": section, "env_name": name, "order": [number, i], "ranks": n}
            made.append(faster(ratio, **common, **shared, **place))
    return made


def write(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write records as `fgpt bench` appends them."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path
