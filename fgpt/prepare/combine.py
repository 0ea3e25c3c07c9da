"""`fgpt data merge` and `import`: new data sets from shards that exist."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from fgpt.data.card import CARD_NAME, SPLITS, DataCard, same_tokenizer
from fgpt.data.recipe import Recipe, SourceSpec, check_recipe
from fgpt.data.shards import IndexedTokens, ShardInfo, check_range
from fgpt.data.token_dataset import open_token_dataset
from fgpt.errors import DataError
from fgpt.prepare.make_card import make_card
from fgpt.prepare.scan import blocks
from fgpt.prepare.shard_writer import ShardWriter
from fgpt.prepare.sources.corpus import Tally
from fgpt.prepare.split import Limits, split_keys, split_limits, text_hash
from fgpt.prepare.workspace import Workspace, exclusive_writer
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.utils.files import write_atomic

Block = tuple[np.ndarray, np.ndarray]
"""ids end to end, and the tokens of each document."""


def merge(paths: Sequence[Path], out: Path, *, force: bool = False) -> DataCard:
    """Put data sets with one tokenizer end to end, split by split.

    Raises DataError: not data sets, other tokenizers, `out` exists.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise DataError("the same data set is named twice; name each once")
    sets = [open_token_dataset(path) for path in paths]
    first = sets[0]
    for other in sets[1:]:
        if not same_tokenizer(first.card, other.card):
            raise DataError(
                f"{other.path}: its tokenizer is {other.card.tokenizer_told()}, that of"
                f" {first.path} is {first.card.tokenizer_told()}; prepare one with the other's"
                " (--tokenizer)"
            )
    spec = first.card.recipe.tokenizer
    recipe = _recipe(out, [str(path) for path in paths], spec)
    tally = Tally()
    known = all(one.card.source.bytes for one in sets)  # an imported one's text is not known
    for one in sets:
        source = one.card.source
        tally.add(
            Tally(
                source.documents,
                source.bytes * known,
                source.empty,
                source.flawed,
                [*source.flaws],
            )
        )

    def write(folder: Path) -> dict[str, ShardInfo]:
        names = [name for name in SPLITS if any(name in one.card.splits for one in sets)]
        shards = {name: [getattr(one, name) for one in sets] for name in names}
        return {
            name: _copied(folder / name, filter(None, some), first.tokenizer)
            for name, some in shards.items()
        }

    return _make(out, recipe, first.tokenizer, tally, write, force)


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
    """Make a data set of shards that Megatron-LM or GPT-NeoX wrote, {split: prefix}.

    Without a validation shard, `validation_fraction` of the documents become it, by their content.
    `append_eod` ends documents with the eod id that do not. Raises DataError for an id out of the
    tokenizer's range, a broken shard, or if `out` exists.
    """
    spec = TokenizerSpec(
        path=tokenizer_path, special_tokens=tokenizer.special_tokens, eod=tokenizer.eod
    )
    recipe = _recipe(out, [str(prefix) for prefix in prefixes.values()], spec)
    recipe = replace(recipe, validation_fraction=validation_fraction, seed=seed)
    check_recipe(recipe, str(out))
    opened = {name: IndexedTokens(prefix) for name, prefix in prefixes.items()}
    ending = _ended(tokenizer.eod_id) if append_eod else None

    def write(folder: Path) -> dict[str, ShardInfo]:
        done = {
            name: _copied(folder / name, [tokens], tokenizer, ending)
            for name, tokens in opened.items()
            if name != "train" or "valid" in opened
        }
        if "valid" not in opened:
            done |= _divided(folder, opened["train"], tokenizer, recipe, ending)
        return done

    return _make(out, recipe, tokenizer, Tally(), write, force)


def same_held_out(cards: Sequence[DataCard]) -> bool:
    """Whether a text that one of these holds out for validation is in no other's training split."""
    rules = {(c.recipe.seed, c.recipe.validation_fraction, c.recipe.test_fraction) for c in cards}
    return len(rules) == 1


def _recipe(out: Path, sources: list[str], tokenizer: TokenizerSpec) -> Recipe:
    recipe = Recipe(out.name, SourceSpec("shards", ", ".join(sources)), tokenizer)
    return check_recipe(recipe, str(out))


def _make(
    out: Path,
    recipe: Recipe,
    tokenizer: Tokenizer,
    tally: Tally,
    write: Callable[[Path], dict[str, ShardInfo]],
    force: bool,
) -> DataCard:
    try:
        with exclusive_writer(out, wait=False):
            space = Workspace(out)
            space.clear_leftovers()
            if (out / CARD_NAME).exists() and not force:
                raise DataError(f"{out}: holds a data set; --force replaces it")
            space.refuse_foreign()
            with space.putting_together() as folder:
                splits = write(folder)
                tokenizer.save(folder)
                if not tally.documents:
                    tally.documents = sum(info.documents for info in splits.values())
                hashes = "".join(info.bin_sha256 for info in splits.values())
                digest = hashlib.sha256(hashes.encode()).hexdigest()
                card = make_card(recipe, 0, tally, digest, tokenizer, splits)
                write_atomic(folder / CARD_NAME, card.to_json())
            return card
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error


def _ended(eod_id: int) -> Callable[[Block], Block]:
    """A function that ends each document of a block with the eod id."""

    def ended(block: Block) -> Block:
        ids, lengths = block
        ends = np.cumsum(lengths)
        missing = ids[ends - 1] != eod_id
        return np.insert(ids, ends[missing], eod_id), lengths + missing

    return ended


def _through(tokens: IndexedTokens, ending: Callable[[Block], Block] | None) -> Iterator[Block]:
    return map(ending, blocks(tokens)) if ending else blocks(tokens)


def _copied(
    prefix: Path,
    shards: Sequence[IndexedTokens] | Iterator[IndexedTokens],
    tokenizer: Tokenizer,
    ending: Callable[[Block], Block] | None = None,
) -> ShardInfo:
    with ShardWriter(prefix, tokenizer.vocab_size) as writer:
        for tokens in shards:
            for ids, lengths in _through(tokens, ending):
                check_range(ids, tokenizer.vocab_size, str(tokens.path))
                writer.extend(ids, lengths)
        return writer.close()


def _divided(
    folder: Path,
    tokens: IndexedTokens,
    tokenizer: Tokenizer,
    recipe: Recipe,
    ending: Callable[[Block], Block] | None,
) -> dict[str, ShardInfo]:
    """Training and validation split of one shard, by the documents' ids."""

    def keys() -> Iterator[np.ndarray]:
        for ids, lengths in blocks(tokens):
            yield _keys(ids, lengths, recipe.seed)

    limits: Limits = split_limits(recipe.validation_fraction, 0.0, keys)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(folder / name, tokenizer.vocab_size))
            for name in limits.names
        ]
        for ids, lengths in blocks(tokens):
            check_range(ids, tokenizer.vocab_size, str(tokens.path))
            side = limits.side(_keys(ids, lengths, recipe.seed))
            for number, writer in enumerate(writers):
                chosen = side == number
                block = ids[np.repeat(chosen, lengths)], lengths[chosen]
                if chosen.any():
                    writer.extend(*(ending(block) if ending else block))
        return dict(zip(limits.names, [writer.close() for writer in writers], strict=True))


def _keys(ids: np.ndarray, lengths: np.ndarray, seed: int) -> np.ndarray:
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    digests = b"".join(text_hash(document.tobytes()) for document in documents)
    return split_keys(seed, np.frombuffer(digests, "u1").reshape(-1, 16))
