"""Recipes are read strictly; all shipped recipes are valid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fgpt.data.recipe import SourceSpec, load_recipe
from fgpt.errors import DataError
from tests.prepare.corpora import REPOSITORY, small_recipe

GOOD = {"name": "x", "source": {"kind": "local", "path": "texts"}}


def load(tmp_path: Path, value: object) -> object:
    path = tmp_path / "r.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return load_recipe(path)


def test_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(REPOSITORY / "data/recipes/python-stdlib.json")
    assert recipe.source == SourceSpec("python-stdlib")
    assert recipe.tokenizer.vocab_size == 4096
    assert recipe.errors == "skip"
    assert load(tmp_path, GOOD) == replace(
        small_recipe(Path("texts")), name="x", validation_fraction=0.01, tokenizer=recipe.tokenizer
    )


@pytest.mark.parametrize("path", sorted((REPOSITORY / "data/recipes").glob("*.json")), ids=str)
def test_shipped_recipes(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.licence and recipe.size and recipe.notes


WRONG = {
    "misspelt key": (GOOD | {"validation_fracton": 0.1}, 'did you mean "validation_fraction"'),
    "misspelt inner key": (
        GOOD | {"tokenizer": {"vocabsize": 300}},
        'unknown key "tokenizer.vocabsize" .did you mean "vocab_size"',
    ),
    "missing source": ({"name": "x"}, 'key "source" is missing'),
    "unknown kind": (GOOD | {"source": {"kind": "web"}}, "\"source.kind\" is 'web'; one of"),
    "string for int": (GOOD | {"seed": "1"}, "\"seed\" is '1'; expected int"),
    "bool for int": (GOOD | {"seed": True}, '"seed" is True; expected int'),
    "float for int": (GOOD | {"seed": 1.0}, '"seed" is 1.0; expected int'),
    "fraction 0": (GOOD | {"validation_fraction": 0}, "expected a number between 0 and 1"),
    "fraction 1": (GOOD | {"validation_fraction": 1.0}, "expected a number between 0 and 1"),
    "negative seed": (GOOD | {"seed": -1}, '"seed" is -1'),
    "small vocabulary": (GOOD | {"tokenizer": {"vocab_size": 256}}, "at least 257 is needed"),
    "name with a slash": (GOOD | {"name": "../x"}, '"name" is'),
    "policy": (GOOD | {"errors": "ignore"}, "\"errors\" is 'ignore'; one of 'strict'"),
    "local without path": (GOOD | {"source": {"kind": "local"}}, '"source.path" is None'),
    "stdlib with path": (
        GOOD | {"source": {"kind": "python-stdlib", "path": "x"}},
        "has no effect on kind python-stdlib",
    ),
    "stdlib with options": (
        GOOD | {"source": {"kind": "python-stdlib", "document_separator": "x"}},
        "source.document_separator.*has no effect on kind python-stdlib",
    ),
    "size of a given tokenizer": (
        GOOD | {"tokenizer": {"vocab_size": 300, "path": "t"}},
        "has no effect with tokenizer.path",
    ),
    "empty separator": (
        GOOD | {"source": GOOD["source"] | {"document_separator": ""}},  # type: ignore[operator]
        "document_separator",
    ),
    "list": ([], "r.json"),
    "comment": ('{"name": "x", // no\n"source": {}}', "line 1 column 15"),
    "duplicate": ('{"name": "x", "name": "y", "source": {"kind": "python-stdlib"}}', "name"),
    "NaN": ('{"name": "x", "validation_fraction": NaN, "source": {}}', "nan"),
    "truncated": ('{"name": "x"', "r.json"),
    "empty": ("", "r.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_twins(tmp_path: Path, case: str) -> None:
    value, message = WRONG[case]
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, value)
    assert str(tmp_path / "r.json") in str(caught.value)


def test_all_faults_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, GOOD | {"sed": 1, "errors": "x", "tokenizer": {"vocab_size": "9"}})
    for part in ('"sed"', '"errors"', '"tokenizer.vocab_size"'):
        assert part in str(caught.value)


def test_digest_ignores_what_does_not_decide_the_data(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    assert replace(recipe, notes="new", licence="MIT", name="y").digest() == recipe.digest()
    for change in ({"seed": 1}, {"errors": "skip"}, {"validation_fraction": 0.2}):
        assert replace(recipe, **change).digest() != recipe.digest()


def test_flags_over_a_recipe_keep_the_rest_of_its_tokenizer(tmp_path: Path) -> None:
    import argparse

    from fgpt.cli.corpus_flags import add_corpus_flags, recipe_from

    parser = argparse.ArgumentParser()
    add_corpus_flags(parser)
    args = parser.parse_args(["--recipe=data/recipes/wikipedia-zh.json", "--vocab_size=16000"])
    args.out = None
    tokenizer = recipe_from(args).tokenizer
    assert (tokenizer.kind, tokenizer.vocab_size) == ("sentencepiece-unigram", 16000)
