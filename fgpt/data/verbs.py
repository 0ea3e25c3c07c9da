"""`fgpt prepare`: flags in, exit code out. Errors are raised as DataError."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fgpt.data.flags import add_corpus_flags, recipe_from
from fgpt.data.prepare.pipeline import prepare
from fgpt.data.recipe import TokenizerSpec, check_recipe


def prepare_verb(argv: Sequence[str]) -> int:
    """fgpt prepare: text -> data set. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fgpt prepare", description="Tokenize a corpus into shards that training reads."
    )
    add_corpus_flags(parser)
    parser.add_argument("--out", help="directory to make; default data/prepared/NAME")
    parser.add_argument("--tokenizer", help="use this tokenizer.json instead of learning one")
    parser.add_argument("--validation_fraction", type=float, help="share of documents held out")
    parser.add_argument("--seed", type=int, help="seed of the train/validation split")
    parser.add_argument("--force", action="store_true", help="replace the data set in --out")
    args = parser.parse_args(argv)
    if args.tokenizer and args.vocab_size:
        parser.error("--vocab_size has no effect with --tokenizer")
    recipe = recipe_from(args)
    if args.tokenizer:
        recipe = replace(recipe, tokenizer=TokenizerSpec(path=args.tokenizer))
    chosen = {"validation_fraction": args.validation_fraction, "seed": args.seed}
    recipe = replace(recipe, **{key: value for key, value in chosen.items() if value is not None})
    check_recipe(recipe, "flags")
    prepare(recipe, args.out or Path("data/prepared", recipe.name), force=args.force)
    return 0
