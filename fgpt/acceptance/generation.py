"""Greedy generation: the same tokens on the device as on the CPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fgpt.acceptance.check import Findings
from fgpt.config.presets import PRESETS
from fgpt.inference.decoder import Decoder
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize

N_TOKENS = 48
PROMPTS = 3


def check_generation(found: Findings) -> None:
    """One token at a time with the key/value cache, in float32; and the speed of it."""
    wanted = _tokens(_decoder(torch.device("cpu")))
    found.require(len(wanted.unique()) > 8, "the model repeats a few tokens: a weak check")
    modes = {"eager": (False, False), "compiled": (True, False), "CUDA graphs": (True, True)}
    for name, (compiled, graphs) in modes.items():
        if graphs and not found.on_gpu:
            found.skip(name)
            continue
        decoder = _decoder(found.device)
        if compiled:
            decoder.compile(cuda_graphs=graphs)
        tokens = _tokens(decoder)
        n_different = int((tokens != wanted).sum())
        found.figure(f"{name}: tokens that differ", n_different, "tokens", at_most=0)


def _decoder(device: torch.device) -> Decoder:
    # rotary positions, and weights ten times as large as usual: the tokens vary
    config = replace(PRESETS["tiny"], n_layer=2, init_std=0.2, position="rotary", n_kv_head=2)
    model = GPT(config)
    initialize(model, config, seed=5)
    model.to(device).eval()
    return Decoder(model.layers(), config, device, torch.float32)


@torch.no_grad()
def _tokens(decoder: Decoder) -> Tensor:
    """int64 [PROMPTS, N_TOKENS] on the CPU; the prompts have different lengths."""
    padding = [0, 3, 5]
    cache = decoder.new_cache(padding, 16 + N_TOKENS)
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(decoder.config.vocab_size, (PROMPTS, 16), generator=generator)
    logits = decoder.decode(ids.to(decoder.device), cache)
    chosen = []
    for _ in range(N_TOKENS):
        assert logits is not None  # one process
        chosen.append(logits.argmax(dim=1))
        logits = decoder.decode(chosen[-1][:, None], cache)
    return torch.stack(chosen, dim=1).cpu()
