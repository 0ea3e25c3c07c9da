"""Flags that select a corpus, common to `fgpt prepare` and `fgpt tokenizer`."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from fgpt.cli.arguments import nonempty
from fgpt.data.recipe import Errors, Recipe, SourceSpec, load_recipe
from fgpt.tokenizer.spec import Kind

FORMATS = ".txt .md .py .jsonl .json (an object per line), also as .gz or .zst; .parquet"
_SOURCE_FLAGS = (
    *("text_field", "document_separator", "document_start"),
    *("config", "split", "revision", "streaming"),
)


def add_corpus_flags(parser: argparse.ArgumentParser) -> None:
    """Add --recipe, --input and --dataset, and the flags that describe how to read them."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", type=nonempty, help="recipe file (data/recipes/*.json)")
    source.add_argument(
        "--input",
        type=nonempty,
        nargs="+",
        action="extend",
        help=f"files or folders of {FORMATS}, or a folder that save_to_disk wrote",
    )
    source.add_argument(
        "--dataset", type=nonempty, help="Hugging Face data set, by its name on the Hub"
    )
    parser.add_argument(
        "--config", type=nonempty, help="configuration of the Hugging Face data set"
    )
    parser.add_argument("--split", type=nonempty, help="split of the data set; default train")
    parser.add_argument(
        "--revision", type=nonempty, help="commit, tag or branch of the data set on the Hub"
    )
    parser.add_argument(
        "--streaming", action="store_true", default=None, help="download while reading, no cache"
    )
    parser.add_argument("--vocab_size", type=int, help="token ids to learn; default 4096")
    parser.add_argument("--kind", choices=get_args(Kind), help="tokenizer to learn; default bpe")
    parser.add_argument(
        "--text_field", type=nonempty, help="field or column of the text; default text"
    )
    parser.add_argument("--document_separator", help=r"between documents of a file, such as '\n\n'")
    parser.add_argument("--document_start", help="regular expression of a document's first row")
    parser.add_argument("--errors", choices=get_args(Errors), help="for malformed documents")


def recipe_from(args: argparse.Namespace) -> Recipe:
    """Return the recipe of --recipe, --input or --dataset, changed by the other flags.

    Raises DataError for an invalid recipe file; the caller checks the result.
    """
    if args.recipe:
        recipe = load_recipe(args.recipe)
    else:
        paths = [args.out] if args.out else args.input or [args.dataset]
        stems = "_".join(Path(os.path.realpath(path)).stem for path in paths)
        if args.dataset:
            spec = SourceSpec("datasets", name=args.dataset)
        else:
            inputs = tuple(args.input)
            spec = SourceSpec("local", inputs if len(inputs) > 1 else inputs[0])
        recipe = Recipe(re.sub(r"[^\w.-]", "_", stems)[:100], spec)
    source = set_flags(args, *_SOURCE_FLAGS)
    if "document_separator" in source:
        source["document_separator"] = _unescaped(source["document_separator"])
    learned = set_flags(args, "vocab_size", "kind")
    if learned:
        recipe = replace(recipe, tokenizer=replace(recipe.tokenizer, path=None, **learned))
    return replace(recipe, source=replace(recipe.source, **source), **set_flags(args, "errors"))


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "\\": "\\"}


def _unescaped(text: str) -> str:
    r"""Read \n, \r, \t, \f, \v, \\, \xHH and \uHHHH, which no shell gives as characters."""

    def character(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        return chr(int(code, 16)) if code else _ESCAPES[match[3]]

    return re.sub(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|([nrtfv\\]))", character, text)


def set_flags(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the values of those of these flags that the user set."""
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
