"""Small recipes and command lines for the tests of muP's checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fgpt.bench.recipe import Common, Recipe
from fgpt.data.token_dataset import open_blended_dataset


def own_recipe(folder: Path, optimizer: dict[str, Any], **model: int) -> Recipe:
    """A recipe that warms up, and a model of two blocks."""
    ds, run = folder / "own.json", folder / "run.json"
    scheduler = {"warmup_num_steps": "auto", "total_num_steps": "auto", "warmup_max_lr": "auto"}
    content = {"gradient_clipping": 1.0, "optimizer": optimizer}
    content["scheduler"] = {"type": "WarmupDecayLR", "params": scheduler}
    ds.write_text(json.dumps(content))
    run.write_text(json.dumps({"model": {"n_layer": 2, **model}}))
    return Recipe("mine", ds, run)


ADAMW: dict[str, Any] = {
    "type": "AdamW",
    "params": {"lr": 0.002, "betas": [0.9, 0.95], "weight_decay": 0.1},
}
MUON: dict[str, Any] = {
    "type": "Muon",
    "params": {"lr": 0.01, "adam_lr": 0.02, "adjust_lr_fn": "match_rms_adamw"},
}


def common_of(small_data: Path) -> Common:
    data = open_blended_dataset(str(small_data))
    run = {"model.preset": "tiny", "data.path": str(small_data), "data.seq_len": 32}
    run |= {"model.vocab_size": data.tokenizer.vocab_size, "speed.compile": "off"}
    deepspeed = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4}
    return Common(run, deepspeed, data, torch.device("cpu"))


def small(tmp_path: Path, small_data: Path, mode: str, *more: str) -> list[str]:
    recipe = own_recipe(tmp_path, ADAMW)
    flags = [f"--{mode}", "--global_batch", "4", "--seq_len", "16", "--data", str(small_data)]
    flags += ["--recipe", f"mine={recipe.deepspeed},{recipe.run_file}"]
    return [*flags, "--out", str(tmp_path / "width.jsonl"), *more]


def interrupted(calls: int, function: Any) -> Any:
    """The function, which is interrupted when it is called once more."""
    left = [None] * calls

    def call(*arguments: Any, **named: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return function(*arguments, **named)

    return call
