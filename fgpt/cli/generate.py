"""`fgpt generate`: continue prompts with a trained model, in one process or split over ranks."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fgpt.cli.arguments import ArgumentParser, file_path, nonempty, seed_number
from fgpt.cli.device_flags import add_device_flags, chosen_device, chosen_dtype
from fgpt.config.schema import SampleConfig
from fgpt.errors import CheckpointError, FgptError, LostRankError, UserError

if TYPE_CHECKING:
    import torch

    from fgpt.distributed.launch import World
    from fgpt.inference.decoder import Decoder
    from fgpt.inference.generate import Limits
    from fgpt.inference.sampling import Sampling
    from fgpt.inference.source import WeightSource
    from fgpt.tokenizer.base import Tokenizer

T = TypeVar("T")
MOST = 2**20
"""Rows, samples, tokens, ranks: more are a typing error."""
NO_MODEL = (
    "no model: name a run directory, a checkpoint, or a directory of Hugging Face (fgpt generate"
    " runs/NAME); `make train` trains one in 3 minutes, `make pretrained` a better one in about 20"
)
EXAMPLES = (
    'fgpt generate runs/tiny-bf16 --prompt "def main(" --max_tokens 60 --temperature 0',
    "fgpt generate runs/tiny-bf16 --prompt_file prompts.txt --batch 16 --json",
    "torchrun --nproc-per-node 2 -m fgpt.cli generate runs/tiny-bf16 --tp 2 --prompt 'def main('",
)


def generate_verb(argv: Sequence[str]) -> int:
    """Print the texts; returns 130 if Ctrl-C ended one. Raises FgptError, OSError."""
    arguments = _parser().parse_args(argv)
    from fgpt.distributed.launch import device_kind, world_from_environment

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
    os.environ.setdefault("DS_ACCELERATOR", arguments.device or device_kind())
    world = world_from_environment(os.environ)
    try:
        sampling, limits = _checked(arguments)
        return _run(arguments, sampling, limits, world)
    except FgptError as error:
        if world.is_rank0 or isinstance(error, LostRankError):
            raise
        return error.exit_code  # all ranks fail alike: rank 0 says why


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt generate",
        description="Continue prompts with a trained model. Without --prompt and --prompt_file,"
        " prompts come from the terminal, a line each (Ctrl-C ends a text, Ctrl-D the session), or"
        " from a pipe, all of it one prompt.",
        examples=EXAMPLES,
    )
    default, add = SampleConfig(), parser.add_argument
    what = "a run directory, a checkpoint, or a directory of Hugging Face"
    add("model", nargs="?", type=file_path, metavar="RUN|CHECKPOINT|EXPORTED", help=what)
    add("--ema", action="store_true", help="the moving average of the weights (train.ema)")
    add("--prompt", action="append", metavar="TEXT", help="may be repeated; empty: a new document")
    lines = "one prompt a line; -: from stdin"
    add("--prompt_file", "--prompt-file", type=nonempty, metavar="FILE", help=lines)
    add("--batch", type=int, default=8, metavar="N", help="prompts at a time (default 8)")
    add("--samples", type=int, default=1, metavar="N", help="texts for each prompt (default 1)")
    add("--max_tokens", "--max-tokens", type=int, default=256, metavar="N", help="(default 256)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")
    temperature = f"0: the most likely token (default {default.temperature})"
    add("--temperature", type=float, default=default.temperature, metavar="X", help=temperature)
    top_k = f"of the k most likely tokens; 0: all (default {default.top_k})"
    add("--top_k", "--top-k", type=int, default=default.top_k, metavar="K", help=top_k)
    add(
        "--top_p",
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="of the most likely ones that together have probability P",
    )
    add(
        "--min_p",
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="of those with P times the largest probability",
    )
    add(
        "--repetition_penalty",
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: fewer repetitions; below 1: more",
    )
    add("--seed", type=seed_number, default=1234, metavar="N", help="of the draws (default 1234)")
    add("--tokenizer", type=file_path, metavar="PATH", help="instead of the model's own")
    add_device_flags(parser)
    add(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compiled decoding; auto: on a GPU, with CUDA graphs",
    )
    add("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks, under torchrun")
    add("--pp", type=int, default=1, metavar="N", help="pipeline stages, under torchrun")
    add("--json", action="store_true", help="a JSON object per text")
    return parser


def _checked(arguments: argparse.Namespace) -> tuple[Sampling, Limits]:
    """Return the options of sampling and length. Raises UserError."""
    if arguments.model is None:
        raise UserError(NO_MODEL)
    if arguments.prompt and arguments.prompt_file:
        raise UserError("--prompt and --prompt_file: give one of them")
    for name in ("batch", "samples", "max_tokens", "tp", "pp"):
        _check(arguments, name, lambda n: 1 <= n <= MOST, f"1 to {MOST:,}")
    _check(arguments, "temperature", lambda x: 0 <= x < float("inf"), "0 (greedy) or more")
    _check(arguments, "top_k", lambda k: k >= 0, "0 (all) or more")
    _check(arguments, "top_p", lambda p: 0 < p <= 1, "above 0, up to 1 (all)")
    _check(arguments, "min_p", lambda p: 0 <= p <= 1, "0 (all) to 1")
    _check(arguments, "repetition_penalty", lambda x: 0.01 <= x <= 100, "0.01 to 100; 1 is off")
    if arguments.compile == "on" and arguments.tp * arguments.pp > 1:
        raise UserError("--compile on: not under --tp and --pp: use --compile off")
    if "" in arguments.stop:
        raise UserError("--stop '': name the text that ends the output")
    from fgpt.inference.generate import Limits
    from fgpt.inference.sampling import Sampling

    sampling = Sampling(
        arguments.repetition_penalty,
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.min_p,
    )
    return sampling, Limits(arguments.max_tokens, tuple(arguments.stop))


def _check(
    arguments: argparse.Namespace, name: str, is_valid: Callable[[Any], bool], allowed: str
) -> None:
    value = getattr(arguments, name)
    if not is_valid(value):
        raise UserError(f"--{name} {value}: must be {allowed}")


def _run(arguments: argparse.Namespace, sampling: Sampling, limits: Limits, world: World) -> int:
    import torch

    from fgpt.distributed.local_ranks import joined_ranks
    from fgpt.inference.session import Session, is_typed, on_all_ranks, prompt_batches

    kind = chosen_device(arguments)
    joined = joined_ranks(world, kind) if world.size > 1 else nullcontext(torch.device(kind))
    with joined as device, torch.inference_mode():
        decoder, tokenizer = _load(arguments, world, device)
        session = Session(
            decoder,
            tokenizer,
            sampling,
            limits,
            seed=arguments.seed,
            samples=arguments.samples,
            as_json=arguments.json,
            is_interactive=is_typed(arguments.prompt, arguments.prompt_file),
        )
        batches = prompt_batches(arguments.prompt, arguments.prompt_file, arguments.batch)
        for prompts in on_all_ranks(session.until_interrupted(batches), world, device):
            session.complete(prompts)
        return session.exit_code


def _load(
    arguments: argparse.Namespace, world: World, device: torch.device
) -> tuple[Decoder, Tokenizer]:
    """Return the decoder and the tokenizer. Raises UserError, the same on all ranks."""
    from fgpt.distributed.launch import GROUP_TIMEOUT
    from fgpt.inference.load_decoder import check_grid, load_decoder_of
    from fgpt.inference.weights import load_tokenizer_for, open_weights
    from fgpt.parallel.topology import Grid, make_process_groups

    grid, is_cuda = Grid(pp=arguments.pp, tp=arguments.tp), device.type == "cuda"
    dtype = chosen_dtype(arguments, device.type)

    # 1. open the files; a rank that cannot must not leave the others waiting in step 2
    def opened() -> tuple[WeightSource, Tokenizer]:
        source = open_weights(arguments.model, ema=arguments.ema)
        check_grid(source.config, grid, world.size)
        return source, load_tokenizer_for(source, arguments.tokenizer)

    source, tokenizer = _on_every_rank(opened, arguments.model, world, device)
    # 2. the groups: all ranks together
    groups = make_process_groups(grid, world.rank, GROUP_TIMEOUT) if world.size > 1 else None
    # 3. this rank's layers
    decoder = _on_every_rank(
        lambda: load_decoder_of(source, groups, device, dtype, pack=arguments.compile != "on"),
        arguments.model,
        world,
        device,
    )
    if arguments.compile == "on" or (arguments.compile == "auto" and is_cuda and world.size == 1):
        decoder.compile(cuda_graphs=is_cuda)
    return decoder, tokenizer


def _on_every_rank(action: Callable[[], T], model: Path, world: World, device: torch.device) -> T:
    """Run an action that does not communicate; if it fails on one rank, all raise that error.

    A file of the model that cannot be read is wrong input.
    """
    from fgpt.distributed.agreements import run_on_all

    def run() -> T:
        try:
            return action()
        except OSError as error:
            path = error.filename or model
            raise CheckpointError(f"{path}: {error.strerror or error}; check the path") from error

    return run() if world.size == 1 else run_on_all(run, device)
