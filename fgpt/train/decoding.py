"""Actions that use the model as its reader will: texts over time, and suites of questions.

The model stays where the engine has it, at any layout.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fgpt.data.token_dataset import BlendedDataset
from fgpt.distributed.agreements import run_on_rank0
from fgpt.distributed.progress import EVALUATION, SAMPLING
from fgpt.engine.base import Engine
from fgpt.errors import LostRankError, TrainingError
from fgpt.evaluation.likelihood import answer
from fgpt.evaluation.questions import Question, QuestionFile, read_questions
from fgpt.inference.decoder import Decoder, make_decoder
from fgpt.inference.generate import Limits, Row, generate, never
from fgpt.inference.sampling import Sampling
from fgpt.report.run_record import METRICS, Sample, distinct_names, read_metrics, read_samples
from fgpt.tokenizer.base import Tokenizer
from fgpt.train.metrics import Metrics
from fgpt.train.run_dir import SAMPLES
from fgpt.train.startup import RunContext
from fgpt.utils.files import no_follow

ROWS = 8
"""Rows of questions that the model reads at a time."""


def sample_text(
    context: RunContext,
    engine: Engine,
    data: BlendedDataset,
    should_stop: Callable[[], bool] = never,
) -> Sample | None:
    """Continue `sample.prompt`; return the text on rank 0. Collective.

    None if `should_stop`, which rank 0 asks before each token, ended it. Raises TrainingError on
    all ranks if the logits are not finite.
    """
    options, tokenizer = context.resolved.run.sample, data.tokenizer
    with ExitStack() as stack:
        completions = generate(
            _decoder(context, engine, stack),
            tokenizer,
            [Row(tokenizer.encode_prompt(options.prompt))],
            Sampling(temperature=options.temperature, top_k=options.top_k),
            Limits(options.tokens),
            seed=context.resolved.run.train.seed,
            should_stop=should_stop,
        )
    if not completions or completions[0].stop_reason == "interrupted":
        return None
    return Sample(engine.step, options.prompt, completions[0].text)


def keep_sample(context: RunContext, sample: Sample) -> None:
    """Add a text to samples.jsonl. Raises OSError."""
    with open(context.path / SAMPLES, "a", opener=no_follow) as file:
        file.write(json.dumps(vars(sample)) + "\n")


def _decoder(context: RunContext, engine: Engine, stack: ExitStack) -> Decoder:
    """The engine's model as a decoder, until the stack is closed."""
    layers = stack.enter_context(engine.decoding_layers())
    dtype = next(engine.model.parameters()).dtype
    config = context.resolved.run.model
    return make_decoder(layers, config, context.device, dtype, engine.groups)


def _last_sample_step(run_dir: Path) -> int | None:
    """The step of the newest text in samples.jsonl; None: there is none."""
    samples = read_samples(run_dir / SAMPLES)
    return samples[-1].step if samples else None


class SampleWriter:
    """Action: a text, every `sample.every` steps."""

    phase = SAMPLING

    def __init__(
        self,
        context: RunContext,
        engine: Engine,
        data: BlendedDataset,
        should_stop: Callable[[], bool],
    ):
        """`should_stop`: see `sample_text`."""
        self.context, self.engine, self.data = context, engine, data
        self.should_stop = should_stop
        self.every = context.resolved.run.sample.every
        self.written_step = run_on_rank0(lambda: _last_sample_step(context.path), context.device)

    def run(self) -> None:
        """Write and print a text of the current step; that it cannot be is a warning."""
        last = self.context.resolved.run.train.steps
        if self.engine.step in (last, self.written_step):
            return  # the last one is written at the end
        try:
            sample = sample_text(self.context, self.engine, self.data, self.should_stop)
            if sample is not None:
                keep_sample(self.context, sample)
        except LostRankError:
            raise
        except (OSError, TrainingError) as error:
            self.context.print(f"step {self.engine.step}: no sample: {error}", "bold red")
            return
        if sample is not None:
            first, *more = (sample.prompt + sample.text).strip().splitlines() or [""]
            self.context.print(
                f"step {self.engine.step:>6}/{last}  sample: {first}{' ...' if more else ''}"
            )


class SuiteEvaluation:
    """Action: the answers to the questions of `eval.suites`, at each evaluation."""

    phase = EVALUATION

    def __init__(
        self,
        context: RunContext,
        engine: Engine,
        tokenizer: Tokenizer,
        files: Sequence[QuestionFile],
        metrics: Metrics | None,
        should_stop: Callable[[], bool],
    ):
        """`metrics`: rank 0's record, None on the other ranks; `should_stop`: see
        `fgpt.train.loop.train`.
        """
        self.context, self.engine, self.tokenizer = context, engine, tokenizer
        self.files, self.metrics, self.should_stop = files, metrics, should_stop
        self.every = context.resolved.run.eval.every
        self.evaluated_step = engine.step if self._is_answered() else None

    def _is_answered(self) -> bool:
        """Whether the records have all answers of this step: a signal may have come first."""
        names, step = {file.name for file in self.files}, self.engine.step

        def answered() -> bool:
            path = self.context.path / METRICS
            suites = read_metrics(path).suites if path.exists() else {}
            return names <= {name for name, points in suites.items() if step in dict(points)}

        return run_on_rank0(answered, self.context.device)

    @torch.no_grad()
    def run(self) -> None:
        """Answer all questions and record the accuracies, unless this step has them."""
        if self.evaluated_step == self.engine.step:
            return
        self.evaluated_step = self.engine.step
        with ExitStack() as stack:
            decoder = _decoder(self.context, self.engine, stack)
            for file in self.files:
                found = answer(
                    decoder.logits,
                    self.tokenizer,
                    file,
                    max_seq_len=decoder.config.max_seq_len,
                    device=decoder.device,
                    batch=ROWS,
                    should_stop=self.should_stop,
                )
                if found is not None and self.metrics is not None:
                    self.metrics.record_suite(self.engine.step, file.name, found.estimates())


def read_suites(context: RunContext) -> list[QuestionFile]:
    """Read the files of `eval.suites` on rank 0, for all ranks. Raises DataError on all."""
    written = (context.resolved.run.eval.suites or "").split(",")
    paths = [Path(name.strip()) for name in written if name.strip()]

    def read() -> list[dict[str, Any]]:
        files = [dataclasses.asdict(read_questions(path)) for path in paths]
        return [
            file | {"name": str(Path(name).with_suffix(""))}
            for file, name in zip(files, distinct_names(paths), strict=True)
        ]

    return [
        QuestionFile(
            file["name"],
            file["format"],
            tuple(
                Question(q["context"], tuple(q["choices"]), q["answer"]) for q in file["questions"]
            ),
        )
        for file in run_on_rank0(read, context.device)
    ]
