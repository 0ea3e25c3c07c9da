"""`fgpt prepare` and `fgpt tokenizer`: flags in, exit code out. Errors are raised as DataError."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fgpt.data.corpus import SourceSpec, Tally, open_corpus
from fgpt.data.decode import Flaw, decode
from fgpt.data.prepare import prepare
from fgpt.data.progress import Reporter
from fgpt.data.recipe import Recipe, TokenizerSpec, check_recipe, load_recipe
from fgpt.data.tokenizer import FILE_NAME, Tokenizer
from fgpt.errors import DataError


def prepare_verb(argv: Sequence[str]) -> int:
    """fgpt prepare: text -> data set. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fgpt prepare", description="Tokenize a corpus into shards that training reads."
    )
    _add_corpus_flags(parser)
    parser.add_argument("--out", help="directory to make; default data/prepared/NAME")
    parser.add_argument("--tokenizer", help="use this tokenizer.json instead of learning one")
    parser.add_argument("--validation_fraction", type=float, help="share of documents held out")
    parser.add_argument("--seed", type=int, help="seed of the train/validation split")
    parser.add_argument("--force", action="store_true", help="replace the data set in --out")
    args = parser.parse_args(argv)
    if args.tokenizer and args.vocab_size:
        parser.error("--vocab_size has no effect with --tokenizer")
    recipe = _recipe(args)
    if args.tokenizer:
        recipe = replace(recipe, tokenizer=TokenizerSpec(path=args.tokenizer))
    chosen = {"validation_fraction": args.validation_fraction, "seed": args.seed}
    recipe = replace(recipe, **{key: value for key, value in chosen.items() if value is not None})
    check_recipe(recipe, "flags")
    prepare(recipe, args.out or Path("data/prepared", recipe.name), force=args.force)
    return 0


def tokenizer_verb(argv: Sequence[str]) -> int:
    """fgpt tokenizer train|encode|decode|inspect. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="fgpt tokenizer", description="Learn or try a tokenizer.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], None], what: str
    ) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=what, description=what)
        verb.set_defaults(run=run)
        return verb

    train = add("train", _train, "Learn a byte-level BPE from a corpus.")
    _add_corpus_flags(train)
    train.add_argument("--out", required=True, help=f"directory that gets {FILE_NAME}")
    train.add_argument("--force", action="store_true", help="replace another tokenizer in --out")
    encode = add("encode", _encode, "Text (the argument, or stdin) -> ids.")
    encode.add_argument("text", nargs="?", help="the text; default: all of stdin")
    decode_ = add("decode", _decode, "Ids -> text.")
    decode_.add_argument("ids", nargs="+", type=int, help="token ids")
    inspect = add("inspect", _inspect, "Vocabulary, fingerprint and longest tokens.")
    for verb in (encode, decode_, inspect):
        verb.add_argument("--tokenizer", required=True, help=f"{FILE_NAME}, or its directory")
    args = parser.parse_args(argv)
    args.run(args)
    return 0


def _add_corpus_flags(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", help="recipe file (data/recipes/*.json)")
    source.add_argument("--input", help="file or folder of .txt .md .py .jsonl .parquet")
    parser.add_argument("--vocab_size", type=int, help="token ids to learn, at most; default 4096")
    parser.add_argument("--text_field", help="field or column with the text; default text")
    parser.add_argument(
        "--document_separator", help=r"text between two documents of a text file, such as '\n\n'"
    )
    parser.add_argument("--errors", choices=("strict", "replace", "skip"), help="for unusable text")


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe file, or one made from --input, with the other corpus flags laid over it."""
    if args.recipe:
        recipe = load_recipe(args.recipe)
    else:
        path = Path(args.out) if args.out else Path(args.input)
        name = re.sub(r"[^\w.-]", "_", path.resolve().stem)
        recipe = Recipe(name, SourceSpec("local", args.input))
    source = {"text_field": args.text_field}
    if args.document_separator is not None:
        source["document_separator"] = args.document_separator.replace("\\n", "\n")
    given = {key: value for key, value in source.items() if value is not None}
    recipe = replace(recipe, source=replace(recipe.source, **given))
    if args.errors:
        recipe = replace(recipe, errors=args.errors)
    if args.vocab_size is not None:
        recipe = replace(recipe, tokenizer=TokenizerSpec(vocab_size=args.vocab_size))
    return recipe


def _train(args: argparse.Namespace) -> None:
    recipe = check_recipe(_recipe(args), "flags")
    corpus, tally, report = open_corpus(recipe.source, recipe.errors), Tally(), Reporter(True)
    seen = report.watch(corpus.documents(tally), "learn tokenizer", corpus.file_bytes)
    tokenizer = Tokenizer.train((doc.text for doc in seen), recipe.tokenizer.vocab_size)
    if not tally.documents:
        raise DataError(f"{corpus.root}: no document with text in it")
    file = Path(args.out, FILE_NAME)
    if (
        file.exists()
        and not args.force
        and Tokenizer.load(file).fingerprint != tokenizer.fingerprint
    ):
        raise DataError(f"{file}: holds another tokenizer; --force replaces it")
    tokenizer.save(file)
    report.say(f"{file}: {tokenizer.vocab_size} ids, SHA-256 {tokenizer.fingerprint[:12]}...")


def _encode(args: argparse.Namespace) -> None:
    text = args.text
    if text is None:
        item = decode(sys.stdin.buffer.read(), "stdin", 0, "strict")
        if isinstance(item, Flaw):
            raise DataError(str(item))
        text = item.text
    print(*Tokenizer.load(args.tokenizer).encode(text))


def _decode(args: argparse.Namespace) -> None:
    print(Tokenizer.load(args.tokenizer).decode(args.ids))


def _inspect(args: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(args.tokenizer)
    spelled = [(tokenizer.token(i), i) for i in range(tokenizer.vocab_size)]
    longest = sorted(spelled, key=lambda pair: (-len(pair[0]), pair[1]))[:10]
    print(f"ids          {tokenizer.vocab_size}")
    print(f"eod id       {tokenizer.eod_id}")
    print(f"SHA-256      {tokenizer.fingerprint}")
    print("longest      " + "  ".join(f"{i}:{text}" for text, i in longest))
