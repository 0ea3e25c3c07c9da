"""From the "source" block of a recipe to the corpus that it names."""

from __future__ import annotations

from fgpt.data.recipe import Errors, SourceSpec
from fgpt.errors import DataError
from fgpt.prepare.sources.corpus import Corpus
from fgpt.prepare.sources.hub import open_hub
from fgpt.prepare.sources.listing import Listing, library
from fgpt.prepare.sources.local import LocalFiles
from fgpt.prepare.sources.readers import ReadOptions


def open_corpus(spec: SourceSpec, errors: Errors) -> Corpus:
    """The corpus of a source. Raises DataError when there is none."""
    options = ReadOptions(spec.text_field, spec.document_separator, spec.document_start, errors)
    if spec.kind == "python-stdlib":
        return LocalFiles(library(), options)
    if spec.kind == "local":
        return LocalFiles(Listing(spec.path or ""), options)
    if spec.kind == "shards":
        raise DataError(
            f"{spec.path}: was put together by fgpt data merge or import; use that again"
        )
    return open_hub(
        spec.name or "",
        spec.config,
        spec.split,
        spec.revision,
        spec.data_files,
        spec.streaming,
        options,
    )
