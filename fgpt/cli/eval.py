"""`fgpt eval`: the loss on a data set, and suites of questions."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.cli.arguments import ArgumentParser, file_path, seed_number
from fgpt.cli.device_flags import add_device_flags, chosen_device, chosen_dtype
from fgpt.cli.run_flags import counted
from fgpt.errors import TrainingError, UserError, printable

if TYPE_CHECKING:
    import torch

    from fgpt.evaluation.interval import Estimate
    from fgpt.inference.decoder import Decoder
    from fgpt.inference.source import WeightSource
    from fgpt.tokenizer.base import Tokenizer

EXAMPLES = (
    "fgpt eval runs/tiny-zero2",
    "fgpt eval runs/tiny-zero2 --data data/prepared/mine --split test",
    "fgpt eval runs/tiny-zero2 --suite hellaswag_val.jsonl --suite arc_easy.jsonl --suite python",
    "fgpt eval exported/ --suite lm-eval:lambada_openai,piqa",
)
HARNESS = "lm-eval:"
PYTHON = "python"
Values = dict[str, Any]
"""Name -> a number, or an `Estimate` in JSON: value, low and high of a 95 % interval."""


def eval_verb(argv: Sequence[str]) -> int:
    """Print losses and answers. Raises UserError."""
    arguments = _parser().parse_args(argv)
    import torch

    from fgpt.inference.weights import load_tokenizer_for, open_weights

    device = torch.device(chosen_device(arguments))
    _check_suites(arguments)
    source = open_weights(arguments.model, ema=arguments.ema)
    tokenizer = load_tokenizer_for(source, arguments.tokenizer)
    results: dict[str, Values] = {}
    if arguments.data is not None or not arguments.suites:
        results |= _held_out(arguments, source, tokenizer, device)
    if arguments.suites:
        results |= _suites(arguments, source, tokenizer, device)
    if arguments.json:
        print(json.dumps({"model": str(source.path), "results": results}))
    else:
        _print(results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt eval",
        description="Evaluate a trained model: loss, perplexity and bits per byte on a split of a"
        " prepared data set, or suites of questions; each with its 95 % confidence interval.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    what = "a run directory, a checkpoint, or a directory of Hugging Face"
    add("model", type=file_path, metavar="RUN|CHECKPOINT|EXPORTED", help=what)
    add("--ema", action="store_true", help="the moving average of the weights (train.ema)")
    add("--data", type=file_path, metavar="DIR", help="prepared data (default: the run's own)")
    add("--split", choices=("train", "valid", "test"), default="valid", help="(default: valid)")
    add("--samples", type=counted, metavar="N", help="only the first N samples of the split")
    add("--seq_len", type=counted, metavar="N", help="tokens of a sample (default: the run's)")
    add(
        "--suite",
        dest="suites",
        action="append",
        default=[],
        metavar="SUITE",
        help="a file of questions (HellaSwag, ARC, LAMBADA, or context, choices, answer); python:"
        " the share of generated texts that parse; lm-eval:TASK,...: tasks of"
        " lm-evaluation-harness. May be repeated",
    )
    add("--limit", type=counted, metavar="N", help="only the first N questions of each suite")
    add("--include", type=file_path, metavar="DIR", help="own tasks of lm-evaluation-harness")
    add("--batch", type=counted, default=8, metavar="N", help="rows at a time (default 8)")
    add(
        "--seed",
        type=seed_number,
        default=1234,
        metavar="N",
        help="(default 1234)",
    )
    add("--tokenizer", type=file_path, metavar="PATH", help="instead of the model's own")
    add_device_flags(parser)
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _check_suites(arguments: argparse.Namespace) -> None:
    """Raise UserError for a suite that cannot be run, before weights are read."""
    for suite in arguments.suites:
        if suite.startswith(HARNESS):
            if not all(suite.removeprefix(HARNESS).split(",")):
                raise UserError(f"--suite {suite}: name the tasks, as in {HARNESS}piqa,arc_easy")
            try:
                import lm_eval  # noqa: F401
            except ImportError as error:
                raise UserError(
                    f"--suite {suite}: needs lm-evaluation-harness: pip install 'fgpt[lm-eval]'"
                ) from error
        elif suite != PYTHON and not Path(suite).is_file():
            raise UserError(
                f"--suite {suite}: no such file; name one of questions, python, or lm-eval:TASK"
            )


# ---- the loss on a data set --------------------------------------------------------------------


def _held_out(
    arguments: argparse.Namespace, source: WeightSource, tokenizer: Tokenizer, device: torch.device
) -> dict[str, Values]:
    from fgpt.data.token_dataset import open_blended_dataset
    from fgpt.evaluation.held_out import held_out_loss
    from fgpt.inference.weights import load_model
    from fgpt.tokenizer.load import COPY

    options, trained_on, seq_len = _data_options(source)
    written = str(arguments.data) if arguments.data is not None else trained_on
    if written is None:
        raise UserError(f"{source.path}: says nothing of its data: name some with --data DIR")
    data = open_blended_dataset(written)
    if data.tokenizer.fingerprint != tokenizer.fingerprint:
        copied = source.path.absolute().parent.parent / COPY
        raise UserError(
            f"{written}: was prepared with another tokenizer than the model's: prepare it again"
            f" with --tokenizer {copied if copied.exists() else source.path}"
        )
    length = arguments.seq_len or min(seq_len, source.config.max_seq_len)
    if length > source.config.max_seq_len:
        raise UserError(
            f"--seq_len {length}: the model's context is {source.config.max_seq_len} tokens"
        )
    if arguments.split == "test" and any(each.test is None for each in data.datasets):
        raise UserError(f"--split test: {written} has none; choose valid")
    dtype = chosen_dtype(arguments, device.type)
    found = held_out_loss(
        load_model(source, device, dtype),
        data,
        arguments.split,
        options,
        length,
        device=device,
        batch=arguments.batch,
        limit=arguments.samples,
    )
    _check_finite(found.loss)
    return {
        f"{data.name}, {arguments.split}": {
            "loss": found.loss.to_json(),
            "perplexity": found.perplexity.to_json(),
            "bits_per_byte": found.bits_per_byte.to_json(),
            "samples": found.samples,
            "tokens": found.tokens,
            "bytes": found.n_bytes,
        }
    }


def _check_finite(estimate: Estimate) -> None:
    """Raise TrainingError for a model that computes no numbers."""
    if math.isnan(estimate.value):
        raise TrainingError(
            "the losses are not finite: training has diverged: use an earlier checkpoint"
        )


def _data_options(source: WeightSource) -> tuple[Any, str | None, int]:
    """How the model's run read its data: options, path, tokens of a sample."""
    from fgpt.config.schema import DataConfig
    from fgpt.utils.json_dataclass import from_json

    written = (source.facts.run_config or {}).get("run", {}).get("data")
    options = DataConfig() if written is None else from_json(DataConfig, written, str(source.path))
    path = None if written is None else options.path
    return options, path, options.seq_len or source.config.max_seq_len


# ---- suites ------------------------------------------------------------------------------------


def _suites(
    arguments: argparse.Namespace, source: WeightSource, tokenizer: Tokenizer, device: torch.device
) -> dict[str, Values]:
    import torch

    from fgpt.distributed.launch import World
    from fgpt.evaluation.questions import read_questions
    from fgpt.inference.load_decoder import load_decoder
    from fgpt.parallel.topology import Grid

    files = [s for s in arguments.suites if s != PYTHON and not s.startswith(HARNESS)]
    questions = {name: read_questions(Path(name), arguments.limit) for name in files}
    dtype = chosen_dtype(arguments, device.type)
    decoder = load_decoder(source, Grid(), World(), device, dtype)
    results: dict[str, Values] = {}
    with torch.inference_mode():
        for suite in arguments.suites:
            if suite in questions:
                results[suite] = _answers(arguments, decoder, tokenizer, questions[suite])
            elif suite == PYTHON:
                results[suite] = _python(arguments, decoder, tokenizer)
            else:
                results |= _harness(arguments, decoder, tokenizer, suite)
    return results


def _answers(
    arguments: argparse.Namespace, decoder: Decoder, tokenizer: Tokenizer, file: Any
) -> Values:
    from fgpt.evaluation.likelihood import answer

    found = answer(
        decoder.logits,
        tokenizer,
        file,
        max_seq_len=decoder.config.max_seq_len,
        device=decoder.device,
        batch=arguments.batch,
    )
    assert found is not None  # this process has the whole model
    _check_finite(found.nats_per_answer)
    values = {name: estimate.to_json() for name, estimate in found.estimates().items()}
    return {**values, "questions": found.n}


def _python(arguments: argparse.Namespace, decoder: Decoder, tokenizer: Tokenizer) -> Values:
    from fgpt.evaluation.python_samples import SAMPLES, share_of_python

    n = arguments.limit or SAMPLES
    found = share_of_python(decoder, tokenizer, n, batch=arguments.batch, seed=arguments.seed)
    assert found is not None  # this process has the whole model
    return {"share_that_parses": found.to_json(), "samples": n}


def _harness(
    arguments: argparse.Namespace, decoder: Decoder, tokenizer: Tokenizer, suite: str
) -> dict[str, Values]:
    from fgpt.evaluation.lm_eval import FgptLM, run_tasks

    tasks = suite.removeprefix(HARNESS).split(",")
    model = FgptLM(decoder, tokenizer, arguments.batch)
    found = run_tasks(model, tasks, limit=arguments.limit, include=arguments.include)
    return {f"{HARNESS}{task}": dict(values) for task, values in found.items()}


# ---- output ------------------------------------------------------------------------------------


def _print(results: dict[str, Values]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("suite", "", "value", "95 % interval"):
        table.add_column(heading, no_wrap=True)
    for suite, values in results.items():
        for i, (name, value) in enumerate(values.items()):
            interval = ""
            if isinstance(value, dict):
                ends, value = (value["low"], value["high"]), value["value"]
                if None not in ends:
                    interval = " - ".join(f"{end:.4f}" for end in ends)
            text = f"{value:,}" if isinstance(value, int) else "not finite"
            text = f"{value:.4f}" if isinstance(value, float) else text
            unit = ", nats per token" if name == "loss" else ""
            name = name.replace("_", " ") + unit
            cells = (suite if i == 0 else "", name, text, interval)
            table.add_row(*(Text(printable(cell)) for cell in cells))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
