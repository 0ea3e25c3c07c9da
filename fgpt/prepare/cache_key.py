"""What finished parts depend on, besides their task: parts that were made from other things go."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from unicodedata import unidata_version

import fgpt
from fgpt.data.recipe import Recipe
from fgpt.prepare.parts import PART_FORMAT
from fgpt.prepare.sources.corpus import TASK_BYTES
from fgpt.prepare.sources.spans import SPAN_BYTES
from fgpt.tokenizer.base import PIECE_BYTES
from fgpt.tokenizer.encoders import Wanted

SOFTWARE = ("tokenizers", "sentencepiece", "gigatoken", "pyarrow", "datasets")


def parts_key(recipe: Recipe, stamp: str, fingerprint: str, encoder: Wanted) -> tuple[str, ...]:
    """Recipe, sources (`Corpus.stamp`), given tokenizer ("": none), encoder, sizes and software."""
    versions = [f"{name} {_version(name)}" for name in SOFTWARE]
    sizes = f"{PART_FORMAT} {TASK_BYTES} {SPAN_BYTES} {PIECE_BYTES} {unidata_version}"
    return recipe.digest(), stamp, fingerprint, encoder, fgpt.__version__, sizes, *versions


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
