"""Recipe -> prepared data set: the pipeline.

1. lock        one writer per output directory; left-overs of a killed run are removed
2. survey      read every document once: hashes, counts, split keys; learn the tokenizer from it
3. encode      read again, in batches over threads; each document ends with the eod id and goes to
               the split its content hash names (split.py)
4. commit      all files fsynced in OUT.tmp, card last, then one rename to OUT

Nothing is ever under the name OUT but a complete data set. A killed run is redone from the start
to the same bytes: a pass costs seconds per 100 MB. The two passes compare hashes, so a corpus that
changes underneath is noticed. Memory: one batch, one document, 4 bytes per document.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers

import fgpt
from fgpt.data.card import (
    CARD_NAME,
    FORMAT,
    DataCard,
    Prepared,
    SourceCard,
    TokenizerCard,
    open_prepared,
)
from fgpt.data.corpus import Corpus, Tally, open_corpus
from fgpt.data.decode import Document
from fgpt.data.encode import encode_splits
from fgpt.data.files import one_writer, sync_directory, write_durably
from fgpt.data.progress import MB, Reporter
from fgpt.data.recipe import Recipe, check_recipe, load_recipe
from fgpt.data.shards import ShardInfo, dtype_for
from fgpt.data.split import split_key, split_limit, text_digest
from fgpt.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from fgpt.errors import DataError


@dataclass
class Survey:
    """What one pass over the corpus adds up to."""

    seed: int
    """The recipe's seed, of the split keys."""
    tally: Tally = field(default_factory=Tally)
    """Counts."""
    smallest: int = 2**64
    """Smallest split key."""
    largest: int = -1
    """Largest split key."""
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    """SHA-256 over the documents' digests."""

    def add(self, document: Document) -> int:
        """Count one document in and return its split key."""
        digest = text_digest(document.text)
        self.digest.update(digest)
        key = split_key(self.seed, digest)
        self.smallest, self.largest = min(self.smallest, key), max(self.largest, key)
        return key


def prepare(
    recipe: Recipe,
    out: str | Path,
    *,
    force: bool = False,
    progress: bool = True,
    wait: bool = False,
) -> DataCard:
    """Make the data set `out` (a directory) from `recipe`, or find that it is there already.

    `force` replaces a data set in `out`; `wait` waits for another writer instead of refusing.
    Raises DataError: unusable corpus, another data set in `out`, another writer, disk full.
    """
    check_recipe(recipe, recipe.name)
    target = Path(out)
    if target.name in ("", ".."):
        raise DataError(f'"{out}" is not a name for a new directory; choose another --out')
    report = Reporter(progress)
    try:
        with one_writer(target, wait):
            tmp = _clear_leftovers(target)
            corpus = open_corpus(recipe.source, recipe.errors)
            if not force:
                card = _existing(recipe, target, corpus, report)
                if card:
                    return card
            _refuse_foreign(target)
            try:
                card = _build(recipe, corpus, tmp, report)
                _commit(tmp, target)
            finally:
                shutil.rmtree(tmp, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror or error})") from error
    report.say(f"{target}: {_summary(card)}")
    return card


def ensure_prepared(
    path: str | Path, recipe_path: str | Path, *, progress: bool = True
) -> Prepared:
    """Open the data set at `path`; prepare it from the recipe first if nothing is there.

    A missing path that does not bear the recipe's name is refused: training must not silently run
    on the default corpus because of a misspelt path. Raises DataError.
    """
    target = Path(path)
    if not (target / CARD_NAME).exists():
        recipe = load_recipe(recipe_path)
        if target.name != recipe.name:
            fix = f"fgpt prepare --recipe {recipe_path} --out {target}"
            what = f"no data set here, and recipe {recipe.name} is another name"
            raise DataError(f"{target}: {what}; correct data.path, or make it with: {fix}")
        prepare(recipe, target, progress=progress, wait=True)
    return open_prepared(target)


def _clear_leftovers(target: Path) -> Path:
    """Remove what a killed run left beside `target`; return the temporary directory's path."""
    tmp, old = _beside(target, ".tmp"), _beside(target, ".old")
    shutil.rmtree(tmp, ignore_errors=True)
    if old.exists() and not target.exists():
        old.rename(target)  # killed between the two renames of _commit
    shutil.rmtree(old, ignore_errors=True)
    return tmp


def _existing(recipe: Recipe, target: Path, corpus: Corpus, report: Reporter) -> DataCard | None:
    """The card of `target` if it holds this recipe's data of these sources, None if nothing."""
    if not (target / CARD_NAME).exists():
        return None
    card = open_prepared(target).card
    remedy = "--force replaces it, or choose another --out"
    if card.recipe_sha256 != recipe.digest():
        what = f"holds data of recipe {card.recipe.name} with other settings"
        raise DataError(f"{target}: {what}; {remedy}")
    given = recipe.tokenizer.path
    if given and load_tokenizer(given).fingerprint != card.tokenizer.sha256:
        raise DataError(f"{target}: was encoded with another tokenizer than {given}; {remedy}")
    survey = Survey(recipe.seed)
    for _ in _surveyed(corpus, survey, report, "compare with sources"):
        pass
    if survey.digest.hexdigest() != card.source.sha256:
        raise DataError(f"{target}: its sources have changed since; {remedy}")
    report.say(f"{target}: up to date, nothing to do ({_summary(card)})")
    return card


def _refuse_foreign(target: Path) -> None:
    is_ours = (target / CARD_NAME).exists()
    if target.exists() and not is_ours and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: exists and is not a data set; choose another --out")


def _build(recipe: Recipe, corpus: Corpus, tmp: Path, report: Reporter) -> DataCard:
    """Write every file of the data set into the new directory `tmp`."""
    report.say(f"prepare {recipe.name}: {len(corpus.files)} files, {corpus.file_bytes / MB:.1f} MB")
    tmp.mkdir(parents=True)
    survey = Survey(recipe.seed)
    tokenizer = _tokenizer(recipe, corpus, survey, report)
    if survey.tally.documents == 0:
        lost = f"{survey.tally.empty} blank, {survey.tally.flawed} skipped"
        raise DataError(f"{corpus.root}: no document with text in it ({lost})")
    limit = split_limit(recipe.validation_fraction, survey.smallest, survey.largest)
    again = Survey(recipe.seed)
    documents = _surveyed(corpus, again, report, "encode", survey.tally.bytes)
    train, valid = encode_splits(documents, recipe.seed, limit, tokenizer, tmp)
    if again.digest.digest() != survey.digest.digest():
        raise DataError(f"{corpus.root}: the corpus changed while it was read; run again")
    tokenizer.save(tmp)
    card = _card(recipe, corpus, survey, tokenizer, train, valid)
    write_durably(tmp / CARD_NAME, card.to_json())
    return card


def _surveyed(
    corpus: Corpus, survey: Survey, report: Reporter, title: str, total_bytes: int | None = None
) -> Iterator[Document]:
    """The corpus's documents, counted into `survey` on the way."""
    total = corpus.file_bytes if total_bytes is None else total_bytes
    for document in report.watch(corpus.documents(survey.tally), title, total):
        survey.add(document)
        yield document


def _tokenizer(recipe: Recipe, corpus: Corpus, survey: Survey, report: Reporter) -> Tokenizer:
    spec = recipe.tokenizer
    if spec.path:
        tokenizer = load_tokenizer(spec.path, spec.special_tokens, spec.eod)
        for _ in _surveyed(corpus, survey, report, "survey"):
            pass
        return tokenizer
    documents = _surveyed(corpus, survey, report, "learn tokenizer")
    return train_tokenizer(spec, (document.text for document in documents))


def _card(
    recipe: Recipe,
    corpus: Corpus,
    survey: Survey,
    tokenizer: Tokenizer,
    train: ShardInfo,
    valid: ShardInfo,
) -> DataCard:
    tally = survey.tally
    return DataCard(
        format=FORMAT,
        recipe=recipe,
        recipe_sha256=recipe.digest(),
        source=SourceCard(
            files=len(corpus.files),
            documents=tally.documents,
            bytes=tally.bytes,
            sha256=survey.digest.hexdigest(),
            empty=tally.empty,
            flawed=tally.flawed,
            flaws=tuple(tally.flaws),
        ),
        tokenizer=TokenizerCard(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id),
        dtype=dtype_for(tokenizer.vocab_size).name,
        bytes_per_token=round(tally.bytes / (train.tokens + valid.tokens), 4),
        train=train,
        valid=valid,
        versions={
            "fgpt": fgpt.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "tokenizers": tokenizers.__version__,
        },
    )


def _commit(tmp: Path, target: Path) -> None:
    """Give `tmp` the name `target`, replacing a data set of that name."""
    sync_directory(tmp)
    old = _beside(target, ".old")
    if target.exists():
        target.rename(old)
    os.rename(tmp, target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _summary(card: DataCard) -> str:
    train, valid = card.train, card.valid
    skipped = f", {card.source.flawed} skipped" if card.source.flawed else ""
    return (
        f"{train.tokens + valid.tokens} tokens in {card.source.documents} documents{skipped}; "
        f"train {train.tokens}, valid {valid.tokens}; "
        f"vocabulary {card.tokenizer.vocab_size}, {card.bytes_per_token:.2f} bytes per token"
    )
