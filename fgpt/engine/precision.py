"""The number formats of a run, and the seeds of its dropout."""

from __future__ import annotations

import hashlib

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make the dropout masks of a step a function of (seed, step, rank).

    Nothing random is carried from step to step, so a resumed run needs no generator states.
    """
    digest = hashlib.sha256(f"dropout:{seed}:{step}:{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
