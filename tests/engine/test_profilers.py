"""DeepSpeed's profilers print true numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.config.resolve import Resolved
from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from fgpt.engine.deepspeed.flops_profiler import FORMULAS
from fgpt.model.count import forward_flops_per_token, n_params
from tests.engine.runs import GLOBAL_BATCH, SEQ_LEN, micro_batches, resolved_run, variant
from tests.ranks import run_ranks

CHECKPOINTED = {"activation_checkpointing": {}}
BF16 = {"bf16": {"enabled": True}}
# name -> (changes of the JSON, run settings)
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero1": ({"zero_optimization": {"stage": 1}}, {}),
    "zero2, one micro-batch": (
        {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4},
        {},
    ),
    "zero3": ({"zero_optimization": {"stage": 3}}, {"speed__loss": "plain"}),
    "zero3 recomputed": ({"zero_optimization": {"stage": 3}, **CHECKPOINTED}, {}),
    "bf16": ({"zero_optimization": {"stage": 1}, **BF16}, {"speed__matmul": "torch"}),
    "tp": ({"zero_optimization": {"stage": 1}}, {"parallel__tp": 2}),
    "tp zero3": ({"zero_optimization": {"stage": 3}}, {"parallel__tp": 2}),
    "cp": ({"zero_optimization": {"stage": 1}}, {"parallel__cp": 2}),
    "dropout": ({}, {"model__dropout": 0.1}),
    "window": ({}, {"model__window": 5, "model__window_pattern": 2}),
}


def profiled(world: World, folder: Path) -> dict[str, tuple[str, int, int]]:
    """Layout -> rank 0's page, the FLOPs of a step and rank by `fgpt.model.count`, parameters."""
    pages = {}
    for name, (changes, settings) in LAYOUTS.items():
        file = folder / f"{name}.txt"
        profiler = {"enabled": True, "profile_step": 1, "detailed": True, "output_file": str(file)}
        config = variant(flops_profiler=profiler, **changes)
        resolved = resolved_run(folder / str(world.rank), config, world.size, **settings)
        engine = build_engine(resolved, world, torch.device("cpu"))
        for step in range(3):
            batches = micro_batches(resolved, world, step)
            engine.train_batch(batches)
            engine.eval_batches(batches)
        engine.close()
        pages[name] = (file.read_text() if world.is_rank0 else "", *expected(resolved))
    return pages


def expected(resolved: Resolved) -> tuple[int, int]:
    model, batch = resolved.run.model, resolved.batch
    tokens = SEQ_LEN * batch.global_size
    return forward_flops_per_token(model, SEQ_LEN) * tokens // batch.world, n_params(model)


def number(page: str, label: str) -> float:
    """The number behind a label of the profiler's page."""
    match = re.search(re.escape(label) + r": +([\d.]+) ([KMGBmu]?)", page)
    assert match, page
    return (
        float(match[1])
        * {"u": 1e-6, "m": 1e-3, "": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}[match[2]]
    )


def test_flash_attention_counts_the_scores_of_each_document_and_window() -> None:
    count = FORMULAS["torch_attn::_varlen_attn"]
    q, offsets = torch.zeros(16, 4, 8), torch.tensor([0, 3, 16], dtype=torch.int32)
    inputs = (q, q, q, offsets, offsets, 13, 13)
    whole, windowed = 4 * (3 * 3 + 13 * 13) * 32, 4 * (3 * 3 + 13 * 5) * 32
    assert count(*inputs, True) == count(*inputs, True, None, [-1, 0]) == whole
    assert count(*inputs, False, None, [4, 0]) == windowed
    assert count(*inputs, window_size=[4, 0]) == windowed


@pytest.mark.dist
def test_flops_profiler_counts_what_the_model_computes(tmp_path: Path) -> None:
    pages, _ = run_ranks(profiled, 2, tmp_path)
    found = {name: number(page, "fwd flops per GPU") for name, (page, _, _) in pages.items()}
    # two digits behind the point are printed
    assert found == pytest.approx({name: flops for name, (_, flops, _) in pages.items()}, rel=5e-3)
    for name, (page, _, n) in pages.items():
        assert "at step 2:" in page and page.count("Profile Summary") == 1
        macs = number(page, "fwd MACs per GPU")
        assert 2 * macs == pytest.approx(number(page, "fwd flops per GPU"), rel=1e-2)
        # the page's own arithmetic: samples per second are the global batch's
        samples = number(page, "samples/second") * number(page, "iter latency")
        assert samples == pytest.approx(GLOBAL_BATCH, rel=0.05), page
        if name not in ("tp", "tp zero3"):  # a tensor rank holds some parameters whole
            assert number(page, "params per GPU") == pytest.approx(n, rel=5e-3), name
