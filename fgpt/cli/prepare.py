"""`fgpt prepare`: flags in, exit code out. Errors are raised as DataError."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from fgpt.cli.corpus_flags import add_corpus_flags, recipe_from
from fgpt.cli.run_flags import counted
from fgpt.data.recipe import TokenizerSpec, check_recipe
from fgpt.prepare.pipeline import prepare
from fgpt.tokenizer.encoders import EncoderChoice


def prepare_verb(argv: Sequence[str]) -> int:
    """fgpt prepare: text -> data set. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fgpt prepare", description="Tokenize a corpus into shards that training reads."
    )
    add_corpus_flags(parser)
    parser.add_argument("--out", help="directory to make; default data/prepared/NAME")
    parser.add_argument("--tokenizer", help="use this tokenizer instead of learning one")
    parser.add_argument("--eod", help="name of that tokenizer's end-of-document token")
    parser.add_argument("--validation_fraction", type=float, help="share of documents held out")
    parser.add_argument("--test_fraction", type=float, help="share held out for a test split")
    parser.add_argument("--seed", type=int, help="seed of the split")
    parser.add_argument("--force", action="store_true", help="replace the data set in --out")
    parser.add_argument("--workers", type=counted, help="processes; default one per core")
    parser.add_argument(
        "--encoder",
        choices=get_args(EncoderChoice),
        default="auto",
        help="auto: the fastest with the tokenizer's ids; exact: the tokenizer's own library",
    )
    args = parser.parse_args(argv)
    if args.tokenizer and (args.vocab_size or args.kind):
        parser.error("--vocab_size and --kind have no effect with --tokenizer")
    if args.eod and not args.tokenizer:
        parser.error("--eod has no effect without --tokenizer")
    recipe = recipe_from(args)
    if args.tokenizer:
        old = recipe.tokenizer
        eod = args.eod or old.eod
        given = TokenizerSpec(path=args.tokenizer, special_tokens=old.special_tokens, eod=eod)
        recipe = replace(recipe, tokenizer=given)
    names = ("validation_fraction", "test_fraction", "seed")
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    recipe = check_recipe(replace(recipe, **chosen), "flags")
    out = args.out or Path("data/prepared", recipe.name)
    prepare(recipe, out, force=args.force, workers=args.workers, encoder=args.encoder)
    return 0
