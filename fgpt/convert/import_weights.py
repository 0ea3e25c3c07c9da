"""Hugging Face -> FGPT: a run directory with one checkpoint of step 0, weights only.

A directory of Hugging Face is itself a source of weights; this makes a copy that has FGPT's
hashes, its boxes and its lineage, and needs no config.json of transformers.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from fgpt.checkpoint.manifest import Manifest, Start
from fgpt.checkpoint.weights_only import weight_tensor, write_weights
from fgpt.convert.export import check_finite
from fgpt.engine.state import Progress
from fgpt.inference.hf_weights import HuggingFaceWeights
from fgpt.inference.source import describe
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.load import COPY, save_copy


def import_weights(source: HuggingFaceWeights, out: Path, tokenizer: Tokenizer | None) -> Path:
    """Write OUT/checkpoints/step_00000000 and, if there is one, OUT/tokenizer; return the first.

    One tensor is in memory at a time. Raises CheckpointError for a weight that is not finite,
    OSError.
    """
    model = asdict(source.config)
    origin = f"imported from {describe(source)}"
    start = Start(0, 0, {}, origin=origin, base_model=source.facts.base_model)
    manifest = Manifest(
        samples_seen=0,
        tokens_seen=0,
        identity={f"model.{name}": value for name, value in model.items()},
        config={"run": {"model": model}},
        optimizer="",
        history=(start,),
        progress=Progress(0),
        files=(),
        tensors={},
    )
    tensors = [
        weight_tensor(name, shape, partial(_read_finite, source, name))
        for name, shape in source.shapes.items()
    ]
    written = write_weights(out / "checkpoints", manifest, tensors)
    if tokenizer is not None:
        save_copy(tokenizer, out / COPY)
    return written


def _read_finite(source: HuggingFaceWeights, name: str) -> Tensor:
    """Return a weight in float32. Raises CheckpointError naming the stored tensor."""
    values = source.read(name).float()
    if not values.isfinite().all():
        for stored, tensor in source.stored.items():
            if any(rows.name == name for rows in tensor.rows):
                check_finite(source.read_stored(stored).float(), stored, source)
    return values
