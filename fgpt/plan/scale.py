"""docs/scale.md: five models on 1 to 98,304 GPUs, as the planner sees them.

python -m fgpt.plan.scale FILE writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from fgpt.config.presets import PRESETS
from fgpt.model.count import n_params
from fgpt.plan.budget import Budget, budget_of
from fgpt.plan.cluster import Cluster, find_device
from fgpt.plan.search import Candidate, SearchSpace, search

MODELS = ("gpt3-1.3b", "llama-8b", "llama-70b", "llama-405b", "gpt-1t")
GPUS = (1, 8, 64, 512, 4096, 16_384, 98_304)
TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022."""
SMALL_BATCH, LARGE_BATCH = 2**22, 2**24
"""Tokens of a step on up to 4,096 GPUs, and on more (Llama 3 405B: 16M)."""
HEADER = """# Scale: from one GPU to 98,304

What `fgpt plan --fit` chooses and predicts; nothing here was measured. `make scale` writes this
page. H100 of 80 GB, 8 in a node, 3,200 Gbit/s of network a node, bf16, {small}M tokens a step
({large}M above 4,096 GPUs), 20 training tokens a parameter. The last column: the largest part of
the time that is not matrix products or attention, or why there is no layout. Days include
failures (50,700 hours between two of one GPU) and saving.
"""


def scale_page(gpu: str = "h100-80g") -> str:
    """Return the page as Markdown."""
    header = HEADER.format(small=SMALL_BATCH >> 20, large=LARGE_BATCH >> 20)
    lines = [header, *(line for model in MODELS for line in _section(model, gpu))]
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, gpu: str) -> Iterator[str]:
    model = PRESETS[name]
    tokens = TOKENS_PER_PARAMETER * n_params(model)
    yield f"## {name}: {n_params(model) / 1e9:,.3g}B parameters, {tokens:.2g} tokens\n"
    yield "| GPUs | layout | GiB | MFU | days | goodput | what limits it |"
    yield "| --: | --- | --: | --: | --: | --: | --- |"
    device = find_device(gpu)
    for gpus in GPUS:
        per_node = min(gpus, device.gpus_per_node)
        cluster = Cluster(device, gpus, per_node, device.network_gbit_s)
        batch = SMALL_BATCH if gpus <= 4096 else LARGE_BATCH
        seq_len = model.max_seq_len
        space = SearchSpace(model, cluster, seq_len, batch // seq_len)
        found = search(space)
        yield _row(gpus, found[0], tokens) if found else _missing(gpus, space)
    yield ""


def _row(gpus: int, best: Candidate, tokens: float) -> str:
    run, budget = best.run, budget_of(best, tokens)
    layout = f"tp {run.tp}, pp {run.pp}, dp {run.dp}" + (f", cp {run.cp}" if run.cp > 1 else "")
    layout += f", ZeRO-{run.zero_stage}, micro-batch {run.micro}"
    layout += "" if run.recompute == "none" else f", recompute {run.recompute}"
    layout += ", optimizer on the host" if run.offloads_optimizer else ""
    gib = best.memory.device_total / 2**30
    cells = [f"{gpus:,}", layout, f"{gib:.0f}", f"{best.time.mfu:.0%}", f"{budget.days:,.1f}"]
    cells += [f"{budget.goodput.goodput:.1%}", _limit(best, budget)]
    return f"| {' | '.join(cells)} |"


def _limit(best: Candidate, budget: Budget) -> str:
    """The largest share of the time that is not useful arithmetic."""
    useful = ("matrix_products", "attention")
    shares = {
        name.replace("_", " "): seconds / best.time.total
        for name, seconds in best.time.terms().items()
        if name not in useful
    }
    shares["failures"] = 1 - budget.goodput.goodput
    name = max(shares, key=lambda key: shares[key])
    return f"{name} {shares[name]:.0%}"


def _missing(gpus: int, space: SearchSpace) -> str:
    """Why there is no layout: memory, or a batch that has too few samples for so many ranks."""
    every = list(space.candidates())
    if not every:
        return f"| {gpus:,} | none | | | | | {space.global_batch:,} samples do not divide |"
    needed = min(-min(c.margin_gib, c.host_margin_gib) for c in every)
    return f"| {gpus:,} | none | | | | | memory: {needed:,.0f} GiB too little |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(scale_page(), encoding="utf-8")
