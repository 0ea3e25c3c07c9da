"""`fgpt data`: flags in, exit code out. Errors are raised as DataError."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fgpt.cli.run_flags import counted
from fgpt.data.card import SPLITS, load_card
from fgpt.data.token_dataset import open_token_dataset
from fgpt.prepare.combine import import_shards, merge, same_held_out
from fgpt.prepare.inspect import as_json, inspect
from fgpt.prepare.verify import survey, verify
from fgpt.tokenizer.load import load_tokenizer


def data_verb(argv: Sequence[str]) -> int:
    """fgpt data inspect|verify|merge|import. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="fgpt data", description="Look at and combine data sets.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], None], what: str
    ) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=what, description=what)
        verb.set_defaults(run=run)
        return verb

    look = add("inspect", _inspect, "Documents, tokens, lengths and samples of text.")
    look.add_argument("path", type=Path, help="a data set, or the prefix of a .bin and .idx")
    look.add_argument("--split", choices=SPLITS, default="train", help="which; default train")
    look.add_argument("--samples", type=counted, default=3, help="documents to show; default 3")
    look.add_argument("--tokenizer", help="to decode with; default the data set's own")
    look.add_argument("--json", action="store_true", help="everything but samples, for programs")
    check = add("verify", _verify, "Read everything and compare it with the card.")
    check.add_argument("paths", type=Path, nargs="+", help="data sets")
    join = add("merge", _merge, "Put data sets with one tokenizer end to end.")
    join.add_argument("paths", type=Path, nargs="+", help="data sets")
    take = add("import", _import, "Make a data set of Megatron-LM's or GPT-NeoX's shards.")
    take.add_argument("--train", type=Path, required=True, help="prefix of a .bin and .idx")
    take.add_argument("--valid", type=Path, help="the same; default: part of --train")
    take.add_argument("--test", type=Path, help="the same")
    take.add_argument("--tokenizer", required=True, help="the tokenizer that encoded them")
    take.add_argument("--eod", help="name of its end-of-document token")
    take.add_argument("--append_eod", action="store_true", help="end documents that it does not")
    take.add_argument("--validation_fraction", type=float, help="of --train; default 0.01")
    take.add_argument("--seed", type=int, help="of the split; default 1234")
    for verb in (join, take):
        verb.add_argument("--out", type=Path, required=True, help="directory to make")
        verb.add_argument("--force", action="store_true", help="replace the data set in --out")
    args = parser.parse_args(argv)
    if args.verb == "import" and args.valid and (args.validation_fraction or args.seed):
        parser.error("--validation_fraction and --seed have no effect with --valid")
    if args.verb == "inspect" and args.json and args.tokenizer:
        parser.error("--tokenizer has no effect with --json")
    args.run(args)
    return 0


def _inspect(args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(as_json(args.path), indent=1))
        return
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    inspect(args.path, Console(), split=args.split, n_samples=args.samples, tokenizer=tokenizer)


def _verify(args: argparse.Namespace) -> None:
    for path in args.paths:
        for line in verify(path):
            print(line)


def _merge(args: argparse.Namespace) -> None:
    card = merge(args.paths, args.out, force=args.force)
    print(f"{args.out}: {card.summary()}")
    if not same_held_out([load_card(path) for path in args.paths]):
        print("  note: they hold out documents by other rules: one's validation text may be in")
        print("  another's training split; prepare them with the same seed and fractions")


def _import(args: argparse.Namespace) -> None:
    given = {name: getattr(args, name) for name in SPLITS}
    chosen = {"validation_fraction": args.validation_fraction, "seed": args.seed}
    card = import_shards(
        {name: prefix for name, prefix in given.items() if prefix is not None},
        load_tokenizer(args.tokenizer, eod=args.eod),
        args.tokenizer,
        args.out,
        **{key: value for key, value in chosen.items() if value is not None},
        append_eod=args.append_eod,
        force=args.force,
    )
    print(f"{args.out}: {card.summary()}")
    tokenizer = card.tokenizer
    tokens = open_token_dataset(args.out).train
    _, not_ended = survey(tokens, tokenizer.vocab_size, tokenizer.eod_id)
    if not_ended:
        print(f"  note: {not_ended:,} documents do not end with the eod id; --append_eod ends them")
