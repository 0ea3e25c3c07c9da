"""What a conversion must prove: both sides give the same logits, or at least the same tensors."""

from __future__ import annotations

import codecs
import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from fgpt.convert.export import as_exported, check_finite, hf_tensor
from fgpt.errors import CheckpointError, TrainingError
from fgpt.inference.hf_files import CONFIG, read_json_object
from fgpt.inference.hf_layout import family_for, hf_tensors
from fgpt.inference.hf_weights import HuggingFaceWeights
from fgpt.inference.source import WeightSource
from fgpt.inference.weights import load_model
from fgpt.model.count import n_params
from fgpt.tokenizer.base import Tokenizer

BOUND = 1e-4
"""Largest difference of two logits; of logits above 1, relative to the largest one."""
MAX_TOKENS = 512
TEXT = (
    "The quick brown fox jumps over the lazy dog, 1234567890 times.\n\n"
    "def mean(values: list[float]) -> float:\n"
    '    """Return the arithmetic mean; raises ZeroDivisionError for no values."""\n'
    "    return sum(values) / len(values)\n\n"
    "Größe, déjà vu, 你好,世界, \N{ROCKET} <|endoftext|> </s>\n"
)
"""What both sides read."""


@dataclass(frozen=True)
class Proof:
    """The comparison of both sides of a conversion."""

    difference: float
    """Largest difference of two values."""
    bound: float
    """The largest allowed one."""
    text: str
    """What was compared, for the user."""

    def check(self) -> None:
        """Raise TrainingError, exit code 1, above the bound."""
        if not self.difference <= self.bound:  # also for nan
            raise TrainingError(
                f"the conversion is wrong, and nothing was written: {self.text}, above"
                f" {self.bound:.1e}; this is a bug in FGPT"
            )


def why_no_logits(source: WeightSource) -> str:
    """Return why the logits of both sides cannot be compared here; empty if they can."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install 'fgpt[hf]')"
    needed = 2 * 4 * n_params(source.config)  # both models in float32
    if needed > (free := psutil.virtual_memory().available):
        return f"two models need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
    return ""


def compare_logits(
    source: WeightSource,
    folder: Path,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    user_path: Path,
) -> Proof:
    """Compare FGPT's logits with those of transformers' model in `folder`, in float32; the weights
    of both are rounded to `dtype`.

    Raises CheckpointError, naming `user_path`, if FGPT's are not finite.
    """
    ids = ids_of_text(tokenizer, source.config.max_seq_len, source.config.vocab_size)
    model = load_model(source, "cpu", torch.float32)
    tensors = hf_tensors(family_for(source.config), source.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _, rounded = as_exported(name, parameter, tensors, dtype)
            parameter.copy_(rounded)
        mine = model(ids)
        del model
        if not mine.isfinite().all():
            raise CheckpointError(
                f"{user_path}: the logits are not finite in float32, although all weights are: the"
                " weights are damaged, or their training diverged; name others"
            )
        other, version = transformers_logits(folder, ids)
    difference = float((mine - other).abs().max())
    bound = BOUND * max(1.0, float(mine.abs().max()))
    what = "of text" if tokenizer is not None else "drawn at random"
    text = (
        f"logits of {ids.shape[1]} tokens {what}: largest difference from transformers {version}"
        f" {difference:.1e}, of logits up to {float(mine.abs().max()):.3g}"
    )
    return Proof(difference, bound, text)


def ids_of_text(tokenizer: Tokenizer | None, max_tokens: int, vocab_size: int) -> Tensor:
    """Return ids of TEXT, or random ones without a tokenizer: int64 [1, T]."""
    n = min(max_tokens, MAX_TOKENS)
    if tokenizer is not None:
        return torch.tensor([tokenizer.encode(TEXT)[:n]])
    return torch.randint(vocab_size, (1, n), generator=torch.Generator().manual_seed(1234))


def transformers_logits(folder: Path, ids: Tensor) -> tuple[Tensor, str]:
    """Logits [B, T, V] of the model in a directory, float32, and the version of transformers.

    Raises CheckpointError for what transformers does not load.
    """
    transformers = _quiet_transformers()
    config, options = None, {"local_files_only": True, "trust_remote_code": False}
    try:
        if (folder / CONFIG).read_bytes().startswith(codecs.BOM_UTF8):  # which it cannot read
            config = transformers.AutoConfig.for_model(**read_json_object(folder / CONFIG))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, **options
        )
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} does not load it, so the conversion"
            f" cannot be proven: {' '.join(str(error).split())}; correct what it names"
        ) from error
    logits: Tensor = model.eval()(ids).logits
    return logits, transformers.__version__


def _quiet_transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def compare_tensors(source: WeightSource, written: WeightSource, dtype: torch.dtype) -> Proof:
    """Compare every weight with the one that was exported in `dtype` and is read back.

    Raises CheckpointError for a weight of the source that is not finite.
    """
    tensors = hf_tensors(family_for(source.config), source.config)
    pairs = (
        (n, as_exported(n, source.read(n).float(), tensors, dtype)[0], written.read(n))
        for n in source.names()
    )
    return _compared(pairs, source)


def compare_stored(source: HuggingFaceWeights, written: WeightSource) -> Proof:
    """Compare every stored tensor, as its file has it, with the one that the export would make of
    the imported weights: nothing that the import has computed is taken for granted.

    Raises CheckpointError for a tensor that is not finite.
    """
    pairs = (
        (name, source.read_stored(name), hf_tensor(written, tensor, torch.float32))
        for name, tensor in source.stored.items()
    )
    return _compared(pairs, source)


def _compared(pairs: Iterable[tuple[str, Tensor, Tensor]], source: WeightSource) -> Proof:
    """Compare (name, expected, found) in float32."""
    largest, n = 0.0, 0
    for name, expected, found in pairs:
        check_finite(expected.float(), name, source)
        difference = float((expected.float() - found.float()).abs().max())
        largest = largest if difference <= largest else difference  # nan stays
        n += 1
        if math.isnan(largest):
            break
    return Proof(largest, 0.0, f"{n} tensors read back: largest difference {largest:.1e}")


def tokenizer_problem(folder: Path, tokenizer: Tokenizer) -> str:
    """Return how transformers' tokenizer in a directory differs from FGPT's, or nothing."""
    transformers = _quiet_transformers()
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        theirs = list(loaded(TEXT)["input_ids"])
    except Exception as error:  # the library raises bare Exception
        return f"does not load it: {str(error).splitlines()[0]}"
    mine = tokenizer.encode_prompt(TEXT)
    if theirs == mine:
        return ""
    first = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    return f"gives other ids than FGPT, the first at token {first}"
