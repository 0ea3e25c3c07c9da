"""Write down what was prepared: the card of a finished data set."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping

import fgpt
from fgpt.data.card import FORMAT, DataCard, SourceCard, TokenizerCard
from fgpt.data.index import dtype_for
from fgpt.data.recipe import Recipe
from fgpt.data.shards import ShardInfo
from fgpt.prepare.sources.corpus import Tally
from fgpt.tokenizer.base import Tokenizer

LIBRARIES = ("numpy", "tokenizers", "sentencepiece")


def make_card(
    recipe: Recipe,
    files: int,
    tally: Tally,
    source_sha256: str,
    tokenizer: Tokenizer,
    splits: Mapping[str, ShardInfo],
) -> DataCard:
    """The card of a data set that was just written."""
    tokens = sum(info.tokens for info in splits.values())
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return DataCard(
        format=FORMAT,
        recipe=recipe,
        recipe_sha256=recipe.digest(),
        source=SourceCard(
            files=files,
            documents=tally.documents,
            bytes=tally.bytes,
            sha256=source_sha256,
            empty=tally.empty,
            flawed=tally.flawed,
            flaws=tuple(tally.flaws),
        ),
        tokenizer=TokenizerCard(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id),
        dtype=dtype_for(tokenizer.vocab_size).name,
        bytes_per_token=round(tally.bytes / tokens, 4),
        train=splits["train"],
        valid=splits["valid"],
        test=splits.get("test"),
        versions={"fgpt": fgpt.__version__, "python": platform.python_version(), **versions},
    )
