"""Cache key of finished parts: if any of these inputs changes, the parts are discarded."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from unicodedata import unidata_version

import fgpt
from fgpt.data.recipe import Recipe
from fgpt.prepare.parts import PART_FORMAT
from fgpt.prepare.sources.corpus import TASK_BYTES
from fgpt.prepare.sources.spans import SPAN_BYTES
from fgpt.tokenizer.base import MAX_CHUNK_BYTES
from fgpt.tokenizer.encoders import EncoderChoice

PACKAGES = ("tokenizers", "sentencepiece", "gigatoken", "pyarrow", "datasets")


def parts_key(
    recipe: Recipe, stamp: str, fingerprint: str, encoder: EncoderChoice
) -> tuple[str, ...]:
    """Return the key: recipe, sources (`Corpus.stamp`), fingerprint of an existing tokenizer ("":
    learned), encoder, sizes and versions.
    """
    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    sizes = f"{PART_FORMAT} {TASK_BYTES} {SPAN_BYTES} {MAX_CHUNK_BYTES} {unidata_version}"
    return recipe.digest(), stamp, fingerprint, encoder, fgpt.__version__, sizes, *versions


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
