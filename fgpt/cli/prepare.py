"""`fgpt prepare`. Raises DataError."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from fgpt.cli.arguments import ArgumentParser, nonempty
from fgpt.cli.corpus_flags import add_corpus_flags, recipe_from, set_flags
from fgpt.cli.run_flags import counted
from fgpt.data.recipe import check_recipe
from fgpt.prepare.pipeline import prepare
from fgpt.tokenizer.encoders import EncoderChoice
from fgpt.tokenizer.spec import TokenizerSpec


def prepare_verb(argv: Sequence[str]) -> int:
    """Run `fgpt prepare`; returns the exit code."""
    parser = ArgumentParser(
        prog="fgpt prepare",
        description="Tokenize a corpus into shards that training reads.",
        examples=(
            "fgpt prepare --recipe data/recipes/python-stdlib.json",
            "fgpt prepare --input texts --vocab_size 8192 --out data/prepared/mine",
        ),
    )
    add_corpus_flags(parser)
    parser.add_argument("--out", type=nonempty, help="output directory; default data/prepared/NAME")
    parser.add_argument(
        "--tokenizer", type=nonempty, help="use this tokenizer instead of learning one"
    )
    parser.add_argument(
        "--eod", type=nonempty, help="name of the end-of-document token of --tokenizer"
    )
    parser.add_argument("--validation_fraction", type=float, help="of documents; default 0.01")
    parser.add_argument(
        "--test_fraction", type=float, help="of documents; default 0, no test split"
    )
    parser.add_argument("--seed", type=int, help="seed of the split; default 1234")
    parser.add_argument("--force", action="store_true", help="replace the data set in --out")
    parser.add_argument("--workers", type=counted, help="worker processes; default one per core")
    parser.add_argument(
        "--encoder",
        choices=get_args(EncoderChoice),
        default="auto",
        help="auto: the fastest that gives the tokenizer's ids; exact: the tokenizer's own library",
    )
    args = parser.parse_args(argv)
    if args.tokenizer and set_flags(args, "vocab_size", "kind"):
        parser.error("--vocab_size and --kind have no effect with --tokenizer")
    if args.eod and not args.tokenizer:
        parser.error("--eod has no effect without --tokenizer")
    recipe = recipe_from(args)
    if args.tokenizer:
        eod, special_tokens = args.eod or recipe.tokenizer.eod, recipe.tokenizer.special_tokens
        spec = TokenizerSpec(path=args.tokenizer, special_tokens=special_tokens, eod=eod)
        recipe = replace(recipe, tokenizer=spec)
    changes = set_flags(args, "validation_fraction", "test_fraction", "seed")
    recipe = check_recipe(replace(recipe, **changes), "flags")
    out = args.out or Path("data/prepared", recipe.name)
    prepare(recipe, out, force=args.force, workers=args.workers, encoder=args.encoder)
    return 0
