"""The "source" block of a recipe -> the corpus."""

from __future__ import annotations

from fgpt.data.recipe import Errors, SourceSpec
from fgpt.errors import DataError
from fgpt.prepare.sources.corpus import Corpus
from fgpt.prepare.sources.hub import open_hub
from fgpt.prepare.sources.local import FileListing, LocalCorpus, standard_library
from fgpt.prepare.sources.readers import ReadOptions


def open_corpus(spec: SourceSpec, errors: Errors) -> Corpus:
    """Open the corpus of a source. Raises DataError if it does not exist."""
    options = ReadOptions(spec.text_field, spec.document_separator, spec.document_start, errors)
    if spec.kind == "python-stdlib":
        return LocalCorpus(standard_library(), options)
    if spec.kind == "local":
        return LocalCorpus(FileListing(spec.path or ""), options)
    if spec.kind == "shards":
        raise DataError(
            f"{spec.path}: this data set was made by fgpt data merge or import; run that again"
        )
    return open_hub(spec, options)
