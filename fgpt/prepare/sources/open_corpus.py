"""The "source" block of a recipe -> the corpus."""

from __future__ import annotations

from fgpt.data.recipe import Errors, SourceSpec
from fgpt.errors import DataError
from fgpt.prepare.sources.corpus import Corpus
from fgpt.prepare.sources.hub import is_saved_dataset, open_hub
from fgpt.prepare.sources.local import FileListing, LocalCorpus, standard_library
from fgpt.prepare.sources.readers import ReadOptions


def open_corpus(spec: SourceSpec, errors: Errors) -> Corpus:
    """Open the corpus of a source. Raises DataError if it does not exist."""
    options = ReadOptions(spec.text_field, spec.document_separator, spec.document_start, errors)
    if spec.kind == "python-stdlib":
        return LocalCorpus([standard_library()], options)
    saved = [path for path in spec.paths if is_saved_dataset(path)]
    if saved and spec.kind == "local":
        if len(spec.paths) > 1:
            fix = "prepare it alone, and join the results with fgpt data merge"
            raise DataError(f"{saved[0]}: a data set saved by Hugging Face's library; {fix}")
        return open_hub(SourceSpec("datasets", name=saved[0]), options)
    if spec.kind == "local":
        paths = dict.fromkeys(spec.paths)  # one that is named twice is read once
        return LocalCorpus(
            [FileListing(path, text_field=spec.text_field) for path in paths], options
        )
    if spec.kind == "shards":
        raise DataError(
            f"{spec.path}: this data set was made by fgpt data merge or import; run that again"
        )
    return open_hub(spec, options)
