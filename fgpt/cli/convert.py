"""`fgpt convert`: Hugging Face in and out."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fgpt.cli.arguments import ArgumentParser, file_path
from fgpt.errors import CheckpointError, DataError, UserError, printable

if TYPE_CHECKING:
    from fgpt.inference.source import WeightSource
    from fgpt.tokenizer.base import Tokenizer

EXAMPLES = (
    "fgpt convert runs/tiny-zero2 --to hf --out exported",
    "fgpt convert exported --from hf --out runs/imported",
)


def convert_verb(argv: Sequence[str]) -> int:
    """Run the verb; 1 if a conversion is not what it should be. Raises FgptError, OSError."""
    parser = ArgumentParser(
        prog="fgpt convert",
        description="Convert weights to and from Hugging Face, and compare the logits of both.",
        examples=EXAMPLES,
    )
    source = "a run directory (its newest checkpoint), a checkpoint, or with --from the directory"
    parser.add_argument("source", type=file_path, metavar="PATH", help=source)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=["hf"], help="hf: a directory that transformers loads")
    way.add_argument("--from", dest="from_", choices=["hf"], help="hf: a run directory of FGPT")
    parser.add_argument(
        "--out", type=file_path, required=True, metavar="DIR", help="a new directory"
    )
    parser.add_argument(
        "--ema", action="store_true", help="the moving average of the weights (train.ema)"
    )
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="of the exported weights (default: fp32, as trained)",
    )
    parser.add_argument(
        "--tokenizer",
        type=file_path,
        metavar="PATH",
        help="file or directory, instead of the run's own tokenizer",
    )
    args = parser.parse_args(argv)
    if args.from_ and args.dtype:
        raise UserError("--dtype: FGPT's weights are float32; leave it out with --from")
    if args.from_ and args.ema:
        raise UserError("--ema is for checkpoints of FGPT: leave it out with --from")
    return _export(args) if args.to else _import(args)


def _say(line: str) -> None:
    print(printable(line), flush=True)


def _export(args: argparse.Namespace) -> int:
    from fgpt.convert.convert import to_hugging_face
    from fgpt.engine.base import DTYPES
    from fgpt.inference.hf_layout import family_for
    from fgpt.inference.weights import open_weights

    source, out = open_weights(args.source, ema=args.ema), args.out
    tokenizer = _tokenizer(source, args.tokenizer)
    dtype = DTYPES[args.dtype or "fp32"]
    to_hugging_face(source, out, dtype=dtype, tokenizer=tokenizer, say=_say)
    _say(f"{out}: {family_for(source.config).architecture} in {str(dtype).removeprefix('torch.')}")
    unused = source.config.vocab_size - tokenizer.vocab_size if tokenizer else 0
    if unused:
        _say(f"vocab_size is {source.config.vocab_size:,}: {unused:,} rows of padding are kept")
    _say(f"publish it with: hf upload USER/{_hub_name(out)} {shlex.quote(str(out))}")
    return 0


def _tokenizer(source: WeightSource, override: Path | None) -> Tokenizer | None:
    """The tokenizer of the weights; None, which is said, if there is none.

    Raises CheckpointError, DataError if `override` is none.
    """
    from fgpt.inference.weights import load_tokenizer_for

    try:
        return load_tokenizer_for(source, override)
    except (CheckpointError, DataError) as error:
        if override is not None:
            raise
        _say(f"converted without a tokenizer: {error}")
        return None


def _hub_name(out: Path) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in out.name)


def _import(args: argparse.Namespace) -> int:
    from fgpt.convert.convert import from_hugging_face
    from fgpt.inference.weights import open_weights

    source = open_weights(args.source)
    tokenizer = _tokenizer(source, args.tokenizer)
    written = from_hugging_face(source, args.out, tokenizer=tokenizer, say=_say)
    _say(f"{written}: weights only, of {source.config.preset}")
    _say(f"train on with --init_from {shlex.quote(str(args.out))}")
    return 0
