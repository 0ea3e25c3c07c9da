"""What `fgpt generate` reads and prints: prompts in batches, texts as they grow, or JSON lines."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

import torch
import torch.distributed as dist

from fgpt.distributed.agreements import run_on_rank0
from fgpt.distributed.launch import PREPARE_TIMEOUT, World
from fgpt.errors import DataError
from fgpt.inference.decoder import Decoder
from fgpt.inference.generate import Completion, Limits, Row, generate, show_nothing
from fgpt.inference.sampling import Sampling
from fgpt.tokenizer.base import Tokenizer


def prompt_batches(
    prompts: Sequence[str] | None, file: str | None, size: int
) -> Iterator[list[str]]:
    """Yield the prompts of the command line, of a file (one a line; - is stdin), or of stdin:
    a line of a terminal each, or all of a pipe. Raises DataError.
    """
    if prompts:
        source: Iterator[str] = iter(prompts)
    elif file is not None:
        source = _lines(file)
    elif is_typed(prompts, file):
        source, size = _typed(), 1
    else:
        source = iter([_read(sys.stdin, "stdin").removesuffix("\n")])
    while batch := list(itertools.islice(source, size)):
        yield batch


def is_typed(prompts: Sequence[str] | None, file: str | None) -> bool:
    """Whether the user types the prompts."""
    return not prompts and file is None and sys.stdin.isatty()


def _lines(file: str) -> Iterator[str]:
    if file == "-":
        text = _read(sys.stdin, "stdin")
    else:
        try:
            with open(file, encoding="utf-8") as stream:
                text = _read(stream, file)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}; check --prompt_file") from error
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise DataError(f"{file}: has no prompt; write one a line")
    yield from prompts


def _read(stream: TextIO, where: str) -> str:
    try:
        return stream.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 (byte {error.start})") from error


def _typed() -> Iterator[str]:
    """Lines that the user types, until Ctrl-D; Ctrl-C begins the line anew."""
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def on_all_ranks(
    batches: Iterator[list[str]], world: World, device: torch.device
) -> Iterator[list[str]]:
    """Yield rank 0's batches on every rank; the others do not read theirs."""
    if world.size == 1:
        yield from batches
        return
    # the user may take longer to type than a collective may take
    group = dist.new_group(timeout=PREPARE_TIMEOUT)
    while (batch := run_on_rank0(lambda: next(batches, None), device, group)) is not None:
        yield batch


class Session:
    """Continues one batch of prompts after the other, and prints the texts on rank 0."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        sampling: Sampling,
        limits: Limits,
        *,
        seed: int,
        samples: int,
        as_json: bool,
        is_interactive: bool,
    ):
        """`samples`: texts for each prompt; `as_json`: print a JSON object for each;
        `is_interactive`: the user types the prompts, and sees them.
        """
        self.decoder, self.tokenizer = decoder, tokenizer
        self.sampling, self.limits = sampling, limits
        self.seed, self.samples, self.as_json = seed, samples, as_json
        self.is_interactive = is_interactive
        self._n_prompts = 0
        self._interrupted = False

    @property
    def exit_code(self) -> int:
        """130 if Ctrl-C has ended the texts, 0 otherwise; at a terminal it ends one of many."""
        return 130 if self._interrupted and not self.is_interactive else 0

    def until_interrupted(self, batches: Iterator[list[str]]) -> Iterator[list[str]]:
        """Yield the batches, until Ctrl-C has ended the texts of one."""
        return itertools.takewhile(lambda _: self.exit_code == 0, batches)

    def complete(self, prompts: Sequence[str]) -> None:
        """Continue these prompts. Collective. Raises TrainingError: see `generate`."""
        # 1. a row for each sample of each prompt
        rows = [
            Row(ids, self._n_prompts + number, sample)
            for number, ids in enumerate(map(self._encode, prompts))
            for sample in range(self.samples)
        ]
        self._n_prompts += len(prompts)
        shown = self.decoder.is_rank0
        streams = shown and len(rows) == 1 and not self.as_json
        if shown:
            self._warn_of_long(rows)
        if streams and not self.is_interactive:
            _write(prompts[0])
        # 2. their texts
        started = time.perf_counter()
        try:
            with self._interrupts():
                completions = generate(
                    self.decoder,
                    self.tokenizer,
                    rows,
                    self.sampling,
                    self.limits,
                    seed=self.seed,
                    on_text=(lambda _, piece: _write(piece)) if streams else show_nothing,
                    should_stop=lambda: self._interrupted,
                )
        finally:
            if streams:  # an error, too, begins a line
                _write("\n")
        elapsed_s = time.perf_counter() - started
        # 3. what has not been shown yet
        if shown and not streams:
            of_each = [prompt for prompt in prompts for _ in range(self.samples)]
            self._print_all(of_each, rows, completions, elapsed_s)

    def _encode(self, prompt: str) -> list[int]:
        return self.tokenizer.encode_prompt(prompt)

    def _warn_of_long(self, rows: Sequence[Row]) -> None:
        context = self.decoder.config.max_seq_len
        for row in rows:
            if row.sample == 0 and len(row.prompt_ids) >= context:
                print(
                    f"fgpt: warning: prompt {row.prompt + 1} has {len(row.prompt_ids)} tokens, and"
                    f" the context {context}: only its last {context - 1} are used, and one new"
                    " token fits",
                    file=sys.stderr,
                )

    def _print_all(
        self,
        prompts: Sequence[str],
        rows: Sequence[Row],
        completions: Sequence[Completion],
        elapsed_s: float,
    ) -> None:
        rate = sum(len(completion.ids) for completion in completions) / elapsed_s
        for prompt, row, completion in zip(prompts, rows, completions, strict=True):
            if self.as_json:
                line = {
                    "prompt": prompt,
                    "sample": row.sample,
                    "text": completion.text,
                    "tokens": len(completion.ids),
                    "stop_reason": completion.stop_reason,
                    "batch_tokens_per_s": round(rate, 1),
                }
                _write(json.dumps(line, ensure_ascii=False) + "\n")
            else:
                sample = f", sample {row.sample + 1}" if self.samples > 1 else ""
                _write(f"--- prompt {row.prompt + 1}{sample}\n{prompt}{completion.text}\n")

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Inside, Ctrl-C ends the texts in progress, a second one the process."""
        self._interrupted = False

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        previous = None
        with suppress(ValueError):  # not the main thread: Ctrl-C does not come here
            previous = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            if previous is not None:
                signal.signal(signal.SIGINT, previous)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
