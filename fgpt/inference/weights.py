"""The weights of a run, a checkpoint of any layout, or a directory of Hugging Face; their
tokenizer; their model. Generation, evaluation, conversion and `--init_from` read weights here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgpt.checkpoint.boxes import Box
from fgpt.checkpoint.directory import locate
from fgpt.checkpoint.identity import DATA
from fgpt.checkpoint.manifest import FILE as MANIFEST
from fgpt.checkpoint.manifest import Manifest, Start, check_names, read_manifest
from fgpt.checkpoint.reader import CheckpointReader
from fgpt.config.field_syntax import parse_blend
from fgpt.config.schema import ModelConfig, SavedModel
from fgpt.data.card import CARD_NAME, load_card
from fgpt.data.token_dataset import load_card_tokenizer
from fgpt.engine.state import EMA, WEIGHT
from fgpt.errors import CheckpointError, DataError, printable
from fgpt.inference.hf_files import CONFIG, is_there, read_json_object, why_link_is_broken
from fgpt.inference.hf_tokenizer_files import SETTINGS, load_hugging_face_tokenizer
from fgpt.inference.hf_weights import HuggingFaceWeights
from fgpt.inference.source import SourceFacts, WeightSource
from fgpt.model.gpt import GPT
from fgpt.parallel.tensor.sharding import full_shapes
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.load import COPY, COPY_SETTINGS, load_copy, load_tokenizer
from fgpt.utils.files import sha256_file
from fgpt.utils.json_dataclass import from_json

WHAT = (
    "name a run directory, one of its checkpoints/step_NNNNNNNN, or a directory of Hugging Face"
    " with config.json and model.safetensors"
)


class CheckpointWeights:
    """A `WeightSource` of a checkpoint of any layout."""

    def __init__(self, path: Path, state: str = WEIGHT):
        """`state`: the weights, or EMA, their moving average.

        Raises CheckpointError unless the files have their sizes and the tensors of the model; the
        contents are not hashed: `fgpt checkpoint verify` does that.
        """
        self.path = path
        manifest = read_manifest(path)
        check_names(path, manifest.files)
        self._reader = CheckpointReader(path, manifest)
        for number, file in enumerate(manifest.files):
            try:
                size = (path / file.name).stat().st_size
                if size == file.size_bytes:
                    self._reader.check_file(number)
            except OSError as error:
                raise CheckpointError(
                    f"{path / file.name}: cannot be read: {error.strerror}; copy the whole"
                    " checkpoint again, or check the permissions"
                ) from error
            if size != file.size_bytes:
                raise CheckpointError(
                    f"{path / file.name}: {size} bytes, the manifest says {file.size_bytes}: copy"
                    " the checkpoint again"
                )
        self.manifest, self._state = manifest, state
        if state == EMA and not manifest.has_average:
            raise CheckpointError(
                f"{path}: has no moving average of the weights: train with --set train.ema=0.999,"
                " or leave --ema out"
            )
        self.config = _model_of(manifest, path)
        first = manifest.history[0] if manifest.history else Start(0, 0, {})
        self.facts = SourceFacts(
            manifest.step,
            manifest.tokens_seen,
            manifest.valid_loss if state == WEIGHT else None,
            manifest.config,
            manifest.origin,
            first.base_model,
            is_average=state == EMA,
        )
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: record.shape for name, record in manifest.tensors.items()
        }
        self._check_shapes()

    def _check_shapes(self) -> None:
        for name, shape in full_shapes(self.config).items():
            if self.shapes.get(name) != tuple(shape):
                raise CheckpointError(
                    f"{self.path}: {name} is {list(self.shapes.get(name, ()))}, its configuration"
                    f" calls for {list(shape)}"
                )

    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which has the hashes of all files. Raises OSError."""
        return sha256_file(self.path / MANIFEST)

    def names(self) -> list[str]:
        """The logical names of all weights."""
        return list(self.manifest.tensors)

    def read(self, name: str) -> Tensor:
        """Return a whole logical tensor, float32. Raises CheckpointError."""
        return self._reader.read(name, self._state)

    def copy(self, name: str, box: Box, target: Tensor) -> None:
        """Copy a box of a logical tensor into `target`, of its sizes, reading nothing else.

        Raises CheckpointError.
        """
        self._reader.copy(name, box, target, self._state)


def _model_of(manifest: Manifest, path: Path) -> ModelConfig:
    run = manifest.config.get("run")
    try:
        return from_json(ModelConfig, (run or {}).get("model"), f"{path}: run.model")
    except (DataError, AttributeError) as error:
        raise CheckpointError(f"{path}: its manifest describes no model: {error}") from error


def data_path(run_config: Mapping[str, Any] | None) -> str | None:
    """Return `data.path` of a resolved configuration; None: it has none."""
    written = (run_config or {}).get("run", {}).get("data", {}).get("path")
    return written if isinstance(written, str) else None


def model_of_newest(path: Path) -> SavedModel | None:
    """Return the model of a run's newest checkpoint, or of the checkpoint that `path` names, from
    its manifest alone; None if there is none. Unreadable ones are skipped.
    """
    try:
        directory, named = locate(path)
    except OSError:
        return None
    for checkpoint in directory.complete() if named is None else [named]:
        with suppress(CheckpointError, OSError):
            manifest = read_manifest(checkpoint)
            model = _model_of(manifest, checkpoint)
            return SavedModel(model, str(checkpoint), data_path(manifest.config))
    return None


def open_weights(path: Path, *, warn: bool = True, ema: bool = False) -> WeightSource:
    """Open the weights of a run's newest checkpoint, a checkpoint (also by `latest` or `best`), or
    a directory of Hugging Face.

    `ema`: the moving average in a checkpoint. With `warn`, rank 0 says what is odd about the
    files. Raises CheckpointError for anything else, and for what is damaged; OSError if a file
    cannot be read.
    """
    problem = why_link_is_broken(path) if os.path.lexists(path) else "does not exist"
    if problem:
        raise CheckpointError(f"{path}: {problem}; {WHAT}")
    directory, checkpoint = locate(path)
    if checkpoint is None:
        checkpoint = directory.newest()
    if checkpoint is not None:
        if not checkpoint.is_dir():
            raise CheckpointError(f"{checkpoint}: no checkpoint there; {WHAT}")
        return CheckpointWeights(checkpoint, EMA if ema else WEIGHT)
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file; {WHAT}")
    if is_there(path / CONFIG) and "run" not in (values := read_json_object(path / CONFIG)):
        if "model_type" not in values:
            raise CheckpointError(f"{path / CONFIG}: has no model_type; {WHAT}")
        if ema:
            raise CheckpointError(f"{path}: --ema is for checkpoints of FGPT: leave it out")
        source = HuggingFaceWeights(path)
        if warn and os.environ.get("RANK", "0") == "0":
            for line in source.warnings:
                print(printable(f"fgpt: warning: {line}"), file=sys.stderr)
        return source
    if (path / "metrics.jsonl").exists() or (path / "checkpoints").exists():
        raise CheckpointError(f"{path}: the run has no checkpoint yet; {WHAT}")
    raise CheckpointError(f"{path}: has no weights; {WHAT}")


def load_model(source: WeightSource, device: torch.device | str, dtype: torch.dtype) -> GPT:
    """Return the whole model in evaluation mode, without gradients. Raises CheckpointError."""
    with torch.device("meta"):
        model = GPT(source.config).to(dtype)
    allocate_parameters(model, torch.device(device))
    for name, parameter in model.named_parameters():
        source.copy(name, Box((0,) * parameter.dim(), tuple(parameter.shape)), parameter.data)
    return model.requires_grad_(False).eval()


def allocate_parameters(model: nn.Module, device: torch.device) -> None:
    """Give parameters of the meta device memory; a tied one stays one parameter."""
    allocated: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in allocated:
                allocated[parameter] = nn.Parameter(torch.empty_like(parameter, device=device))
            setattr(module, name, allocated[parameter])


def load_tokenizer_for(source: WeightSource, override: Path | None = None) -> Tokenizer:
    """Return the tokenizer of these weights, or the one that `override` names: a file, a directory,
    or a prepared data set.

    Raises CheckpointError if there is none or the model has too few rows for it, DataError if it is
    damaged.
    """
    tokenizer = _override(override) if override is not None else _own_tokenizer(source)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise CheckpointError(
            f"{override or source.path}: the tokenizer has {tokenizer.vocab_size} ids, the model"
            f" {source.config.vocab_size} rows: name the model's own with --tokenizer"
        )
    return tokenizer


def _override(path: Path) -> Tokenizer:
    if (path / COPY_SETTINGS).exists():
        return load_copy(path)
    if (path / CARD_NAME).exists():
        return load_card_tokenizer(path, load_card(path))
    if (path / SETTINGS).exists():
        return load_hugging_face_tokenizer(path)
    return load_tokenizer(path)


def _own_tokenizer(source: WeightSource) -> Tokenizer:
    # 1. a directory of Hugging Face
    if isinstance(source, HuggingFaceWeights):
        return load_hugging_face_tokenizer(source.path)
    # 2. the copy in the run directory
    copied = Path(os.path.abspath(source.path)).parent.parent / COPY
    if (copied / COPY_SETTINGS).exists():
        return load_copy(copied)
    # 3. runs of earlier versions: the prepared data, if it is what the run was trained on
    remedy = "name the tokenizer with --tokenizer FILE|DIR"
    written = data_path(source.facts.run_config)
    if written is None:
        raise CheckpointError(f"{source.path}: has no tokenizer: {remedy}")
    directory = Path(parse_blend(written)[0].path)
    if not (directory / CARD_NAME).exists():
        raise CheckpointError(
            f"{source.path}: has no copy of its tokenizer, and its data {directory} is not there:"
            f" {remedy}"
        )
    card = load_card(directory)
    if isinstance(source, CheckpointWeights):
        trained_on = source.manifest.identity.get(DATA, "")
        if card.fingerprint() not in str(trained_on):
            raise CheckpointError(
                f"{source.path}: has no copy of its tokenizer, and {directory} is no longer the"
                f" data that it was trained on: {remedy}"
            )
    return load_card_tokenizer(directory, card)
