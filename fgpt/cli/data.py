"""`fgpt data`: inspect, verify, merge and import data sets. Raises DataError."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from rich.console import Console

from fgpt.cli.arguments import ArgumentParser, file_path, nonempty
from fgpt.cli.corpus_flags import set_flags
from fgpt.cli.run_flags import counted, subcommands
from fgpt.data.card import SPLITS, load_card
from fgpt.data.token_dataset import open_token_dataset
from fgpt.errors import printable
from fgpt.prepare.combine import have_same_split_rule, import_shards, merge
from fgpt.prepare.inspect import inspect, inspect_as_json
from fgpt.prepare.verify import scan_ids, verify
from fgpt.tokenizer.load import load_tokenizer

SPLIT_FLAGS = ("validation_fraction", "seed")


def data_verb(argv: Sequence[str]) -> int:
    """Run `fgpt data inspect|verify|merge|import`; returns the exit code."""
    parser = ArgumentParser(
        prog="fgpt data",
        description="Inspect and combine data sets.",
        examples=["fgpt data inspect data/prepared/mine"],
    )
    add = subcommands(parser)

    inspect_ = add(
        "inspect",
        _inspect,
        "Documents, tokens, lengths and samples of text.",
        "fgpt data inspect data/prepared/mine --split valid --samples 5",
    )
    inspect_.add_argument(
        "path", type=file_path, help="a data set, or the prefix of a .bin and .idx"
    )
    inspect_.add_argument("--split", choices=SPLITS, help="default train")
    inspect_.add_argument("--samples", type=counted, help="documents to show; default 3")
    inspect_.add_argument(
        "--tokenizer", type=nonempty, help="tokenizer to decode with; default the data set's"
    )
    inspect_.add_argument("--json", action="store_true", help="print JSON, without samples of text")
    verify_ = add(
        "verify",
        _verify,
        "Read a data set completely and compare it with its card.",
        "fgpt data verify data/prepared/mine",
    )
    verify_.add_argument("paths", type=file_path, nargs="+", help="data sets")
    merge_ = add(
        "merge",
        _merge,
        "Concatenate data sets with the same tokenizer.",
        "fgpt data merge data/prepared/a data/prepared/b --out data/prepared/ab",
    )
    merge_.add_argument("paths", type=file_path, nargs="+", help="data sets")
    import_ = add(
        "import",
        _import,
        "Make a data set from shards of Megatron-LM or GPT-NeoX.",
        "fgpt data import --train shards/my_text_document --tokenizer data/tokenizers/mine"
        " --out data/prepared/theirs",
    )
    import_.add_argument("--train", type=file_path, required=True, help="prefix of a .bin and .idx")
    import_.add_argument("--valid", type=file_path, help="the same; default: a fraction of --train")
    import_.add_argument("--test", type=file_path, help="the same")
    import_.add_argument(
        "--tokenizer", type=nonempty, required=True, help="tokenizer that encoded the shards"
    )
    import_.add_argument(
        "--eod", type=nonempty, help="name of the tokenizer's end-of-document token"
    )
    import_.add_argument("--append_eod", action="store_true", help="append missing eod ids")
    import_.add_argument("--validation_fraction", type=float, help="of --train; default 0.01")
    import_.add_argument("--seed", type=int, help="seed of the split; default 1234")
    for verb in (merge_, import_):
        verb.add_argument("--out", type=file_path, required=True, help="output directory")
        verb.add_argument("--force", action="store_true", help="replace the data set in --out")
    args = parser.parse_args(argv)
    if args.verb == "import" and args.valid and set_flags(args, *SPLIT_FLAGS):
        parser.error("--validation_fraction and --seed have no effect with --valid")
    if args.verb == "inspect" and args.json and set_flags(args, "split", "samples", "tokenizer"):
        parser.error("--split, --samples and --tokenizer have no effect with --json")
    args.run(args)
    return 0


def _inspect(args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(inspect_as_json(args.path), indent=1))
        return
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    split, n_samples = args.split or "train", args.samples or 3
    inspect(args.path, Console(), split=split, n_samples=n_samples, tokenizer=tokenizer)


def _verify(args: argparse.Namespace) -> None:
    for path in args.paths:
        for line in verify(path):
            print(printable(line))


def _merge(args: argparse.Namespace) -> None:
    card = merge(args.paths, args.out, force=args.force)
    print(printable(f"{args.out}: {card.summary()}"))
    if not have_same_split_rule([load_card(path) for path in args.paths]):
        print(
            "  note: the data sets were split with different seeds or fractions, so validation text"
        )
        print("  of one may be in the training split of another; prepare them with the same values")


def _import(args: argparse.Namespace) -> None:
    card = import_shards(
        set_flags(args, *SPLITS),
        load_tokenizer(args.tokenizer, eod=args.eod),
        args.tokenizer,
        args.out,
        **set_flags(args, *SPLIT_FLAGS),
        append_eod=args.append_eod,
        force=args.force,
    )
    print(printable(f"{args.out}: {card.summary()}"))
    tokenizer = card.tokenizer
    tokens = open_token_dataset(args.out).train
    _, without_eod = scan_ids(tokens, tokenizer.vocab_size, tokenizer.eod_id)
    if without_eod:
        print(
            f"  note: {without_eod:,} documents do not end with the eod id; --append_eod appends it"
        )
