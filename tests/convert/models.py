"""Small random models of FGPT and of transformers, saved."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fgpt.checkpoint.manifest import Manifest, Start
from fgpt.checkpoint.weights_only import weight_tensor, write_weights
from fgpt.config.schema import ModelConfig
from fgpt.engine.state import Progress
from fgpt.model.gpt import GPT

SMALL: dict[str, Any] = {"vocab_size": 405, "max_seq_len": 32, "n_layer": 2, "d_model": 32}
SMALL |= {"n_head": 4}
LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": LLAMA,
    "llama with biases": LLAMA | {"bias": True, "rotary_base": 5e5},
    "qwen3": LLAMA | {"qk_norm": True, "d_head": 16},
}


def small_config(kind: str = "gpt2", **changes: Any) -> ModelConfig:
    """A model of the kind with an odd vocabulary."""
    return ModelConfig(**SMALL | KINDS[kind] | changes)


def randomize(model: nn.Module) -> None:
    """Every parameter differs from its initial value and from every other."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            mean = 1.0 if parameter.dim() == 1 else 0.0
            parameter.normal_(mean, 0.2, generator=generator)


def save_random(run: Path, config: ModelConfig, scale: float = 1.0) -> Path:
    """Write a run directory with one checkpoint of random weights; return the directory."""
    model = GPT(config)
    randomize(model)
    manifest = Manifest(
        samples_seen=24,
        tokens_seen=768,
        identity={},
        config={"run": {"model": asdict(config)}},
        optimizer="AdamW",
        history=(Start(0, 0, {}),),
        progress=Progress(3),
        valid_loss=5.5,
        files=(),
        tensors={},
    )
    weights = [
        weight_tensor(name, tuple(p.shape), partial(torch.mul, p.detach(), scale))
        for name, p in model.named_parameters()
    ]
    write_weights(run / "checkpoints", manifest, weights)
    return run


def save_transformers(folder: Path, kind: str, *, tied: bool, kv: int = 4, **more: Any) -> Any:
    """Save a small random model of transformers; return it."""
    import transformers

    transformers.logging.set_verbosity_error()
    ids = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 405, "tie_word_embeddings": tied}
    widths = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    widths |= {"num_attention_heads": 4, "num_key_value_heads": kv, "max_position_embeddings": 32}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            n_positions=32, n_embd=32, n_layer=2, n_head=4, **ids, **more
        )
    elif kind == "llama":
        config = transformers.LlamaConfig(**widths, **ids, **more)
    else:
        config = transformers.Qwen3Config(**widths, head_dim=16, **ids, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model
