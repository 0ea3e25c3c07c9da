"""The gpt2 row of `fgpt bench single`, with the shares of its kernels, beside the peers' speeds."""

from __future__ import annotations

import subprocess
import sys

from fgpt.acceptance.check import Findings
from fgpt.bench.record import read
from fgpt.bench.scenario_record import samples_per_s

PEERS_H100 = (
    ("nanoGPT, torch.compile, autocast bf16", 498_041),
    ("nanoGPT, eager", 379_521),
    ("transformers GPT2LMHeadModel, torch.compile", 425_634),
    ("nanoGPT's model in DeepSpeed ZeRO-1, compiled", 453_000),
    ("a plain GPT with fp32 masters, one compiled graph, CUDA graphs", 539_406),
)
"""Tokens per second of GPT-2 124M on one H100 80GB (torch 2.11): micro-batch 32, 1024 tokens, bf16,
AdamW, clipping; measured by FGPT's authors. Other GPUs compare only roughly."""
WORKLOAD = {"cuda": "gpt2", "cpu": "seed-1m"}
VARIANT = "best"


def check_speed(found: Findings) -> None:
    """Tokens per second, MFU, memory and where the time goes; a CPU measures the smallest model."""
    workload, out = WORKLOAD[found.device_kind], found.work / "speed.jsonl"
    command = ["bench", "single", "--rows", workload, "--only", VARIANT, "--out", str(out)]
    command += ["--minutes", "2" if found.on_gpu else "0.5", "--trace", str(found.work / "trace")]
    done = subprocess.run([sys.executable, "-m", "fgpt.cli", *command], check=False)
    found.require(done.returncode == 0, f"fgpt bench: exit code {done.returncode}, see the log")
    records = [record for record in read(out) if record["env_name"] == VARIANT]
    found.require(bool(records), f"fgpt bench: no record of {workload}, {VARIANT}")
    for record in records[-1:]:
        found.require(record["state"] == "measured", f"{record['state']}: {record['why']}")
        if record["state"] in ("measured", "wrong"):
            _figures(found, record)
    if found.on_gpu:
        for peer, tokens_per_s in PEERS_H100:
            found.figure(f"peer on an H100: {peer}", tokens_per_s, "tokens/s")
    else:
        found.skip("gpt2, beside its peers")


def _figures(found: Findings, record: dict) -> None:
    tokens_per_s = samples_per_s(record, "train") * record["seq_len"]
    name = record["row"]
    found.figure(f"{name}: training", tokens_per_s, "tokens/s")
    found.figure(f"{name}: peak memory", record["memory"]["peak_bytes"] / 2**30, "GiB")
    if record["peak_tflops"]:
        tflops = tokens_per_s * record["flops_per_token"] / 1e12
        found.figure(f"{name}: MFU", tflops / record["peak_tflops"], "of 1")
    found.require(bool(record["trace"]), f"{name}: no trace: {record['extras_failed']}")
    for kind, share in (record["trace"] or {}).items():
        found.figure(f"{name}: time in {kind}", share, "of 1")
