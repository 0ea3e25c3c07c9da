"""Decoding on a CPU against `transformers.generate`: same weights, threads, prompts, in one run.

    python -m fgpt.bench.decoding [--threads 1] [--dtype fp32]

CPU time of this process (with one thread, that of the work, also on a busy machine); the best of
several turns, which alternate. Prefill: one token. Decoding: the further ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fgpt.distributed.launch import World
from fgpt.engine.base import DTYPES
from fgpt.inference.decoder import Decoder
from fgpt.inference.generate import Limits, Row, generate
from fgpt.inference.load_decoder import load_decoder
from fgpt.inference.sampling import Sampling
from fgpt.inference.weights import open_weights
from fgpt.parallel.topology import Grid
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer

PROMPT_TOKENS, NEW_TOKENS, TURNS = 64, 24, 5
SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
}


def models() -> dict[str, Any]:
    """Return models of transformers with random weights."""
    import transformers

    return {
        "GPT-2, 124 M": transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        "Llama, 8 M": transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    }


def compare(theirs: Any, decoder: Decoder, batch: int) -> dict[str, tuple[float, float]]:
    """Return who -> (prefill in seconds, decoded tokens per second of CPU time)."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = decoder.config.vocab_size
    ids = torch.randint(1, vocabulary, (batch, PROMPT_TOKENS), generator=generator)
    rows = [Row(row, i) for i, row in enumerate(ids.tolist())]
    tokenizer = train_tokenizer(TokenizerSpec(vocab_size=300), ["a b c"] * 5)
    tokenizer.vocab_size, tokenizer.eod_id = vocabulary, -1  # any id; texts do not end

    def ours(n: int) -> Sequence[Sequence[int]]:
        with torch.inference_mode():
            texts = generate(decoder, tokenizer, rows, Sampling(temperature=0), Limits(n))
        return [text.ids for text in texts]

    def transformers(n: int) -> Sequence[Sequence[int]]:
        lengths = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}
        ends = {"pad_token_id": 0, "eos_token_id": None}
        output = theirs.generate(ids, attention_mask=torch.ones_like(ids), **lengths, **ends)
        new: list[list[int]] = output[:, PROMPT_TOKENS:].tolist()
        return new

    best = _best((ours, transformers), must_agree=decoder.dtype == torch.float32)
    results = {}
    for who, (prefill_s, whole_s) in best.items():
        results[who] = (prefill_s, batch * (NEW_TOKENS - 1) / (whole_s - prefill_s))
    return results


def _best(
    functions: Sequence[Callable[[int], Sequence[Sequence[int]]]], *, must_agree: bool
) -> dict[str, tuple[float, float]]:
    """Return name -> best CPU seconds of one token and of NEW_TOKENS.

    `must_agree`: the tokens of all must be the same; in 16 bits, roundings choose among near ties.
    """
    best = {(f.__name__, n): float("inf") for f in functions for n in (1, NEW_TOKENS)}
    texts = []
    for _ in range(TURNS):
        for function in functions:
            for n in (1, NEW_TOKENS):
                begun = time.process_time()
                texts.append((n, function(n)))
                key = (function.__name__, n)
                best[key] = min(best[key], time.process_time() - begun)
    first = {n: text for n, text in reversed(texts)}
    assert not must_agree or all(text == first[n] for n, text in texts), "the texts differ"
    return {f.__name__: (best[f.__name__, 1], best[f.__name__, NEW_TOKENS]) for f in functions}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = DTYPES[arguments.dtype]
    print("| model | batch | tokens/s | transformers | ratio | prefill, ms | transformers |")
    print("|---|---|---|---|---|---|---|")
    for name, theirs in models().items():
        theirs.eval().to(dtype)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            source = open_weights(Path(folder))
            decoder = load_decoder(source, Grid(), World(), torch.device("cpu"), dtype)
        for batch in (1, 8):
            found = compare(theirs, decoder, batch)
            (own_s, own), (other_s, other) = found["ours"], found["transformers"]
            cells = (name, batch, f"{own:.0f}", f"{other:.0f}", f"{own / other:.2f}")
            row = (*cells, f"{own_s * 1e3:.0f}", f"{other_s * 1e3:.0f}")
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
