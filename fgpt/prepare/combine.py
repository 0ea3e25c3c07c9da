"""`fgpt data merge` and `import`: new data sets from existing shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from fgpt.data.card import CARD_NAME, SPLITS, DataCard
from fgpt.data.recipe import Recipe, SourceSpec, check_recipe
from fgpt.data.shards import IndexedTokens, ShardInfo, check_id_range
from fgpt.data.token_dataset import check_same_tokenizer, open_token_dataset
from fgpt.errors import DataError
from fgpt.prepare.assemble import make_card
from fgpt.prepare.shard_writer import ShardWriter
from fgpt.prepare.sources.corpus import ReadStats
from fgpt.prepare.split import split_boundaries, split_keys, text_hash
from fgpt.prepare.verify import iter_document_blocks
from fgpt.prepare.workspace import Workspace, dataset_lock
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.utils.files import write_atomic


def merge(paths: Sequence[Path], out: Path, *, force: bool = False) -> DataCard:
    """Concatenate data sets with one tokenizer, split by split.

    Raises DataError: not a data set, different tokenizers, `out` exists.
    """
    if len(set(map(os.path.realpath, paths))) < len(paths):
        raise DataError("the same data set is named twice; name each once")
    datasets = [open_token_dataset(path) for path in paths]
    check_same_tokenizer(datasets)
    first = datasets[0]
    recipe = _shards_recipe(out, paths, first.card.recipe.tokenizer)
    stats = ReadStats()
    for dataset in datasets:
        source = dataset.card.source
        flaws = list(source.flaws)
        stats.add(ReadStats(source.documents, source.bytes, source.empty, source.flawed, flaws))
    if not all(dataset.card.source.bytes for dataset in datasets):
        stats.bytes = 0  # the size of an imported data set's text is unknown

    def write(folder: Path) -> dict[str, ShardInfo]:
        shards = {name: [getattr(each, name) for each in datasets] for name in SPLITS}
        return {
            name: _copy(folder / name, [shard for shard in some if shard], first.tokenizer)
            for name, some in shards.items()
            if any(some)
        }

    return _write_dataset(out, recipe, first.tokenizer, stats, write, force)


def import_shards(
    prefixes: Mapping[str, Path],
    tokenizer: Tokenizer,
    tokenizer_path: str,
    out: Path,
    *,
    validation_fraction: float = 0.01,
    seed: int = 1234,
    append_eod: bool = False,
    force: bool = False,
) -> DataCard:
    """Make a data set from shards of Megatron-LM or GPT-NeoX, {split: prefix}.

    Without a validation shard, `validation_fraction` of the training documents become the
    validation split, selected by content. `append_eod`: append the eod id to documents without it.
    Raises DataError for an id out of range, a corrupt shard, or if `out` exists.
    """
    spec = TokenizerSpec(
        path=tokenizer_path, special_tokens=tokenizer.special_tokens, eod=tokenizer.eod
    )
    recipe = _shards_recipe(out, prefixes.values(), spec)
    recipe = replace(recipe, validation_fraction=validation_fraction, seed=seed)
    check_recipe(recipe, str(out))
    shards = {name: IndexedTokens(prefix) for name, prefix in prefixes.items()}
    eod_id = tokenizer.eod_id if append_eod else None

    def write(folder: Path) -> dict[str, ShardInfo]:
        splits = {
            name: _copy(folder / name, [tokens], tokenizer, eod_id)
            for name, tokens in shards.items()
            if name != "train" or "valid" in shards
        }
        if "valid" not in shards:
            splits |= _divide(folder, shards["train"], tokenizer, recipe, eod_id)
        return splits

    return _write_dataset(out, recipe, tokenizer, ReadStats(), write, force)


def have_same_split_rule(cards: Sequence[DataCard]) -> bool:
    """Return whether equal texts are in the same split in all of these data sets."""
    rules = {(c.recipe.seed, c.recipe.validation_fraction, c.recipe.test_fraction) for c in cards}
    return len(rules) == 1


def _shards_recipe(out: Path, sources: Iterable[Path], tokenizer: TokenizerSpec) -> Recipe:
    source = SourceSpec("shards", ", ".join(map(str, sources)))
    return check_recipe(Recipe(out.name, source, tokenizer), str(out))


def _write_dataset(
    out: Path,
    recipe: Recipe,
    tokenizer: Tokenizer,
    stats: ReadStats,
    write: Callable[[Path], dict[str, ShardInfo]],
    force: bool,
) -> DataCard:
    try:
        with dataset_lock(out, wait=False):
            workspace = Workspace(out)
            workspace.remove_leftovers()
            if (out / CARD_NAME).exists() and not force:
                raise DataError(f"{out}: holds a data set; --force replaces it")
            workspace.check_target()
            with workspace.staging_directory() as folder:
                splits = write(folder)
                tokenizer.save(folder)
                if not stats.documents:
                    stats.documents = sum(info.documents for info in splits.values())
                hashes = "".join(info.bin_sha256 for info in splits.values())
                digest = hashlib.sha256(hashes.encode()).hexdigest()
                card = make_card(recipe, 0, stats, digest, tokenizer, splits)
                write_atomic(folder / CARD_NAME, card.to_json())
            return card
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error


def _append_missing_eod(
    ids: np.ndarray, lengths: np.ndarray, eod_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Append the eod id to the documents of a block that end otherwise; None: to no document."""
    if eod_id is None:
        return ids, lengths
    ends = np.cumsum(lengths)
    is_missing = ids[ends - 1] != eod_id
    return np.insert(ids, ends[is_missing], eod_id), lengths + is_missing


def _copy(
    prefix: Path, shards: Sequence[IndexedTokens], tokenizer: Tokenizer, eod_id: int | None = None
) -> ShardInfo:
    """Write the concatenation of `shards`."""
    with ShardWriter(prefix, tokenizer.vocab_size) as writer:
        for tokens in shards:
            for ids, lengths in iter_document_blocks(tokens):
                ids, lengths = _append_missing_eod(ids, lengths, eod_id)
                check_id_range(ids, tokenizer.vocab_size, str(tokens.path))
                writer.extend(ids, lengths)
        return writer.close()


def _divide(
    folder: Path, tokens: IndexedTokens, tokenizer: Tokenizer, recipe: Recipe, eod_id: int | None
) -> dict[str, ShardInfo]:
    """Divide a shard into training and validation split, by hashes of the documents' ids."""

    def documents() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids, lengths in iter_document_blocks(tokens):
            yield _document_keys(ids, lengths, recipe.seed), lengths

    boundaries = split_boundaries(recipe.validation_fraction, 0.0, documents)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(ShardWriter(folder / name, tokenizer.vocab_size))
            for name in boundaries.names
        }
        for ids, lengths in iter_document_blocks(tokens):
            check_id_range(ids, tokenizer.vocab_size, str(tokens.path))
            splits = boundaries.assign(_document_keys(ids, lengths, recipe.seed))
            for number, writer in enumerate(writers.values()):
                chosen = splits == number
                if chosen.any():
                    chosen_ids = ids[np.repeat(chosen, lengths)]
                    writer.extend(*_append_missing_eod(chosen_ids, lengths[chosen], eod_id))
        return {name: writer.close() for name, writer in writers.items()}


def _document_keys(ids: np.ndarray, lengths: np.ndarray, seed: int) -> np.ndarray:
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    digests = b"".join(text_hash(document.tobytes()) for document in documents)
    return split_keys(seed, np.frombuffer(digests, "u1").reshape(-1, 16))
