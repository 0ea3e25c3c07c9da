"""Flags that name a corpus, shared by the verbs that read one."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from fgpt.data.recipe import Errors, Recipe, SourceSpec, load_recipe
from fgpt.tokenizer.spec import Kind

FORMATS = ".txt .md .py .jsonl (also as .gz, .zst) .parquet"
_SOURCE = ("text_field", "document_separator", "document_start", "config", "split", "revision")


def add_corpus_flags(parser: argparse.ArgumentParser) -> None:
    """Add --recipe, --input or --dataset, and what says how to read them."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", help="recipe file (data/recipes/*.json)")
    source.add_argument("--input", help=f"file or folder of {FORMATS}")
    source.add_argument("--dataset", help="Hugging Face data set, by its name on the Hub")
    parser.add_argument("--config", help="configuration of the Hugging Face data set")
    parser.add_argument("--split", help="its split to read; default train")
    parser.add_argument("--revision", help="its commit, tag or branch on the Hub")
    parser.add_argument(
        "--streaming", action="store_true", default=None, help="read it over the network, keep none"
    )
    parser.add_argument("--vocab_size", type=int, help="token ids to learn, at most; default 4096")
    parser.add_argument("--kind", choices=get_args(Kind), help="tokenizer to learn; default bpe")
    parser.add_argument("--text_field", help="field or column with the text; default text")
    parser.add_argument(
        "--document_separator", help=r"text between two documents of a text file, such as '\n\n'"
    )
    parser.add_argument(
        "--document_start", help="regular expression of a document's first row, if a row is a line"
    )
    parser.add_argument("--errors", choices=get_args(Errors), help="for unusable text")


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The recipe file, or one made from --input or --dataset, with the other flags laid over it.

    Raises DataError for a recipe file with faults; the caller checks the result.
    """
    if args.recipe:
        recipe = load_recipe(args.recipe)
    else:
        place = Path(args.out or args.input or args.dataset)
        name = re.sub(r"[^\w.-]", "_", place.resolve().stem)
        kind = SourceSpec("local", args.input)
        if args.dataset:
            kind = SourceSpec("datasets", name=args.dataset)
        recipe = Recipe(name, kind)
    source = _given(args, *_SOURCE, "streaming")
    if "document_separator" in source:
        source["document_separator"] = source["document_separator"].replace("\\n", "\n")
    learned = _given(args, "vocab_size", "kind")
    if learned:
        recipe = replace(recipe, tokenizer=replace(recipe.tokenizer, path=None, **learned))
    return replace(recipe, source=replace(recipe.source, **source), **_given(args, "errors"))


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
