"""Both conversions, from a source to a directory that is complete and proven, or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fgpt.convert.export import export
from fgpt.convert.import_weights import import_weights
from fgpt.convert.model_card import model_card
from fgpt.convert.proof import (
    compare_logits,
    compare_tensors,
    tokenizer_problem,
    why_no_logits,
)
from fgpt.errors import CheckpointError, UserError
from fgpt.inference.hf_layout import family_for
from fgpt.inference.hf_weights import HuggingFaceWeights
from fgpt.inference.source import WeightSource
from fgpt.inference.weights import open_weights
from fgpt.tokenizer.base import Tokenizer


def to_hugging_face(
    source: WeightSource,
    out: Path,
    *,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    say: Callable[[str], None],
) -> None:
    """Export to the new directory `out`; `say` prints what was proven.

    Raises CheckpointError, UserError, TrainingError if the proof fails, OSError.
    """
    family_for(source.config)  # before anything is written
    with new_directory(out) as folder:
        export(source, folder, dtype, tokenizer)
        (folder / "README.md").write_text(model_card(source, out.absolute().name, tokenizer))
        if reason := why_no_logits(source):
            say(f"no logits compared: {reason}")
            written = HuggingFaceWeights(folder)
            proof = compare_tensors(source, written, lambda weight: weight.to(dtype))
        else:
            proof = compare_logits(source, folder, dtype, tokenizer)
            if tokenizer is not None and (problem := tokenizer_problem(folder, tokenizer)):
                say(f"warning: the tokenizer: transformers {problem}: use FGPT's to encode text")
        proof.check()
        say(proof.text)


def from_hugging_face(
    source: WeightSource,
    out: Path,
    *,
    tokenizer: Tokenizer | None,
    say: Callable[[str], None],
) -> Path:
    """Import into the new run directory `out`; return its checkpoint.

    Raises as `to_hugging_face`.
    """
    if not isinstance(source, HuggingFaceWeights):
        raise CheckpointError(
            f"{source.path}: is FGPT's own already; --from hf reads a directory with config.json"
            " and model.safetensors"
        )
    with new_directory(out) as folder:
        written = import_weights(source, folder, tokenizer)
        opened = open_weights(folder)
        if reason := why_no_logits(source):
            say(f"no logits compared: {reason}")
            proof = compare_tensors(source, opened, lambda weight: weight)
        else:
            proof = compare_logits(opened, source.path, torch.float32, tokenizer)
        proof.check()
        say(proof.text)
    return out / written.relative_to(folder)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a directory that becomes `out` at the end, and is removed after an error.

    Raises UserError if `out` exists.
    """
    partial_dir = out.absolute().with_name(out.absolute().name + ".tmp")
    for path, what in ((out, "exists already"), (partial_dir, "is left of another conversion")):
        if os.path.lexists(path):
            raise UserError(f"--out {path}: {what}; remove it, or name a new directory")
    partial_dir.mkdir(parents=True)
    try:
        yield partial_dir
        partial_dir.rename(out)
    except BaseException:
        shutil.rmtree(partial_dir, ignore_errors=True)
        raise
