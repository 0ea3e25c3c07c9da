"""`fgpt tokenizer`: flags in, exit code out. Errors are raised as DataError."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fgpt.data.corpus.base import Tally, documents
from fgpt.data.corpus.decode import Flaw, decode
from fgpt.data.corpus.source import open_corpus
from fgpt.data.flags import add_corpus_flags, recipe_from
from fgpt.data.progress import Reporter
from fgpt.data.recipe import check_recipe
from fgpt.data.tokenizer import load_tokenizer, train_tokenizer
from fgpt.data.tokenizer.jsonfile import FILE_NAME
from fgpt.errors import DataError


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
    add_corpus_flags(train)
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


def _train(args: argparse.Namespace) -> None:
    recipe = check_recipe(recipe_from(args), "flags")
    corpus, tally, report = open_corpus(recipe.source, recipe.errors), Tally(), Reporter(True)
    with report.watch("learn tokenizer", corpus.total_bytes) as going:

        def texts() -> Iterator[str]:
            for document in documents(corpus, tally):
                going.advance(len(document.data))
                yield document.text

        tokenizer = train_tokenizer(recipe.tokenizer, texts())
    if not tally.documents:
        raise DataError(f"{corpus.label}: no document with text in it")
    file = Path(args.out, tokenizer.file_name)
    if (
        file.exists()
        and not args.force
        and load_tokenizer(file).fingerprint != tokenizer.fingerprint
    ):
        raise DataError(f"{file}: holds another tokenizer; --force replaces it")
    tokenizer.save(file)
    report.say(f"{file}: {tokenizer.vocab_size} ids, SHA-256 {tokenizer.fingerprint[:12]}...")


def _encode(args: argparse.Namespace) -> None:
    text = args.text
    if text is None:
        data = decode(sys.stdin.buffer.read(), 0, "strict")
        if isinstance(data, Flaw):
            raise DataError(str(data.at("stdin")))
        text = data.decode()
    print(*load_tokenizer(args.tokenizer).encode(text))


def _decode(args: argparse.Namespace) -> None:
    print(load_tokenizer(args.tokenizer).decode(args.ids))


def _inspect(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer)
    spelled = [(tokenizer.token(i), i) for i in range(tokenizer.vocab_size)]
    longest = sorted(spelled, key=lambda pair: (-len(pair[0]), pair[1]))[:10]
    print(f"ids          {tokenizer.vocab_size}")
    print(f"eod id       {tokenizer.eod_id}")
    print(f"SHA-256      {tokenizer.fingerprint}")
    print("longest      " + "  ".join(f"{i}:{text}" for text, i in longest))
