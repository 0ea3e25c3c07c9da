"""`train.init_from`: a new run that begins with the weights of another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from fgpt.checkpoint.boxes import Box
from fgpt.checkpoint.reader import open_intact, targets
from fgpt.distributed.agreements import run_on_all
from fgpt.engine.base import Engine
from fgpt.engine.state import Progress
from fgpt.errors import CheckpointError, DataError
from fgpt.inference.source import WeightSource, describe
from fgpt.inference.weights import CheckpointWeights, load_tokenizer_for, open_weights
from fgpt.model.init import initial_value
from fgpt.parallel.tensor.sharding import full_shapes
from fgpt.tokenizer.base import Tokenizer
from fgpt.train.startup import RunContext


@dataclass(frozen=True)
class InitialWeights:
    """Opened weights that fit the run's model, and intact."""

    source: WeightSource
    lineage: str

    def describe(self) -> str:
        """Where they are from, for the history in the run's checkpoints."""
        return self.lineage

    def load(self, engine: Engine, context: RunContext) -> None:
        """Fill the engine's weights; its optimizer states and its step stay new. Collective.

        Rows of the vocabulary that the source lacks get their initial values. Raises
        CheckpointError on all ranks if it fails on any.
        """
        run = context.resolved.run
        with engine.restoring(Progress(0), ()) as tensors:

            def fill() -> None:
                new = cache(partial(initial_value, config=run.model, seed=run.train.seed))
                for tensor in tensors:
                    with tensor.open() as values:
                        for name, shape, box, target, _ in targets(tensor, values):
                            _fill_box(self.source, new, name, shape, box, target)

            run_on_all(fill, context.device)

    def tokenizer_warning(self, tokenizer: Tokenizer) -> str:
        """Return how the data's tokenizer differs from the source's, or nothing if it does not or
        is not known.
        """
        try:
            own = load_tokenizer_for(self.source)
        except (CheckpointError, DataError, OSError):
            return ""
        if own.fingerprint == tokenizer.fingerprint:
            return ""
        theirs, mine = (f"{t.fingerprint[:12]}..., {t.vocab_size} ids" for t in (own, tokenizer))
        return (
            f"warning: the data's tokenizer ({mine}) is not the one of the weights ({theirs}):"
            " their embeddings mean other tokens"
        )


def _fill_box(
    source: WeightSource,
    new: Callable[[str, torch.Size], Tensor],
    name: str,
    shape: tuple[int, ...],
    box: Box,
    target: Tensor,
) -> None:
    """Copy what the source has of a box; the rows beyond it are new."""
    rows = source.shapes[name][0] if shape else 0
    begin, end = box.offsets[0], box.ends[0]
    n_old = max(0, min(end, rows) - begin)
    if n_old:
        old = Box(box.offsets, (n_old, *box.sizes[1:]))
        source.copy(name, old, target[:n_old])
    if n_old < end - begin:
        full = new(name, torch.Size(shape))
        beyond = Box((begin + n_old, *box.offsets[1:]), (end - begin - n_old, *box.sizes[1:]))
        with torch.no_grad():
            target[n_old:].copy_(full[tuple(map(slice, beyond.offsets, beyond.ends))])


VOCABULARY = ("embedding.token.weight", "head.weight")
"""Parameters with a row for each id."""


def open_initial_weights(context: RunContext) -> InitialWeights | None:
    """Open `train.init_from`, each rank hashing its share of a checkpoint's files. Collective.

    Raises CheckpointError.
    """
    path = context.resolved.run.train.init_from
    if path is None:
        return None

    def open_and_check() -> InitialWeights:
        source = open_weights(Path(path), warn=False)  # the command line has been read with it
        if isinstance(source, CheckpointWeights):
            open_intact(source.path, context.world.rank, context.world.size)
        for name, shape in full_shapes(context.resolved.run.model).items():
            saved, is_vocabulary = source.shapes.get(name), name in VOCABULARY
            if saved is None or (saved[1:] if is_vocabulary else saved) != (
                tuple(shape[1:]) if is_vocabulary else tuple(shape)
            ):
                raise CheckpointError(
                    f"--init_from {path}: {name} is {saved}, this run's {list(shape)}; leave out"
                    " the model's options, which come from the weights"
                )
        return InitialWeights(source, describe(source))

    return run_on_all(open_and_check, context.device)
