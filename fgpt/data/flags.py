"""Flags that name a corpus, shared by the verbs that read one."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

from fgpt.data.corpus.source import SourceSpec
from fgpt.data.recipe import Recipe, load_recipe
from fgpt.data.tokenizer.spec import TokenizerSpec


def add_corpus_flags(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", help="recipe file (data/recipes/*.json)")
    source.add_argument("--input", help="file or folder of .txt .md .py .jsonl .parquet")
    parser.add_argument("--vocab_size", type=int, help="token ids to learn, at most; default 4096")
    parser.add_argument("--text_field", help="field or column with the text; default text")
    parser.add_argument(
        "--document_separator", help=r"text between two documents of a text file, such as '\n\n'"
    )
    parser.add_argument("--errors", choices=("strict", "replace", "skip"), help="for unusable text")


def recipe_from(args: argparse.Namespace) -> Recipe:
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
