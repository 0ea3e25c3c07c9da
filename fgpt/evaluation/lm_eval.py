"""FGPT's models in lm-evaluation-harness (the extra `fgpt[lm-eval]`), registered as `fgpt`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)

from fgpt.distributed.launch import World
from fgpt.engine.base import DTYPES
from fgpt.errors import UserError
from fgpt.evaluation.likelihood import Continuation, log_likelihoods
from fgpt.inference.decoder import Decoder
from fgpt.inference.generate import Limits, Row, generate
from fgpt.inference.load_decoder import load_decoder
from fgpt.inference.sampling import Sampling
from fgpt.inference.weights import load_tokenizer_for, open_weights
from fgpt.parallel.topology import Grid
from fgpt.tokenizer.base import Tokenizer

DEFAULT_TOKENS = 256
"""Of `generate_until` requests that state no number."""


@register_model("fgpt")
class FgptLM(TemplateLM):
    """The harness's interface to a decoder and its tokenizer."""

    backend = "causal"

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, batch_size: int = 8):
        super().__init__()
        self.decoder, self.fgpt_tokenizer, self.batch = decoder, tokenizer, batch_size

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> FgptLM:
        """Open a model for `lm_eval --model fgpt --model_args path=RUN,dtype=fp32`.

        Raises CheckpointError, DataError.
        """
        options = {**(additional_config or {}), **arg_dict}
        device = torch.device(options.get("device") or "cpu")
        source = open_weights(Path(str(options["path"])))
        dtype = DTYPES[str(options.get("dtype", "fp32"))]
        decoder = load_decoder(source, Grid(), World(), device, dtype)
        return cls(decoder, load_tokenizer_for(source), int(options.get("batch_size") or 8))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> FgptLM:
        """As `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.fgpt_tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text without context."""
        return (self.fgpt_tokenizer.prompt_prefix or (self.eot_token_id,))[0]

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """Text -> ids."""
        return self.fgpt_tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = log_likelihoods(
            self.decoder.logits,
            [Continuation(context, ids) for _, context, ids in requests],
            max_seq_len=self.decoder.config.max_seq_len,
            device=self.decoder.device,
            batch=self.batch,
        )
        return [(each.nats, each.is_greedy) for each in found]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the model's context."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.eot_token_id, self.decoder.config.max_seq_len, 1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings."""
        texts: dict[int, str] = {}
        arguments = [request.args for request in requests]
        # requests with equal options are continued together
        for options in {json.dumps(each, sort_keys=True, default=str) for _, each in arguments}:
            same = [
                (i, context)
                for i, (context, each) in enumerate(arguments)
                if json.dumps(each, sort_keys=True, default=str) == options
            ]
            for begin in range(0, len(same), self.batch):
                some = same[begin : begin + self.batch]
                found = self._generate(some, arguments[some[0][0]][1])
                texts |= zip((i for i, _ in some), found, strict=True)
        return [texts[i] for i in range(len(arguments))]

    def _generate(self, prompts: Sequence[tuple[int, str]], options: dict[str, Any]) -> list[str]:
        """Continue (number, context) pairs that have these options."""
        until = options.get("until") or []
        stop = tuple(filter(None, [until] if isinstance(until, str) else until))
        n_tokens = int(options.get("max_gen_toks", DEFAULT_TOKENS))
        room = self.decoder.config.max_seq_len - n_tokens
        if room < 1:
            raise UserError(
                f"--suite lm-eval: a task generates {n_tokens} tokens, and the model's context is"
                f" {self.decoder.config.max_seq_len}: choose another task"
            )
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        rows = [
            Row((self.tok_encode(text) or [self.eot_token_id])[-room:], i) for i, text in prompts
        ]
        found = generate(
            self.decoder,
            self.fgpt_tokenizer,
            rows,
            Sampling(temperature=temperature),
            Limits(n_tokens, stop),
        )
        return [each.text for each in found]


@torch.inference_mode()
def run_tasks(
    model: FgptLM, tasks: Sequence[str], *, limit: int | None, include: Path | None
) -> dict[str, dict[str, float]]:
    """Return task -> metric -> value. `include`: a folder with the YAML files of own tasks.

    Raises UserError for a task that the harness does not know.
    """
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UserError(
            f"--suite lm-eval: unknown task {unknown[0]!r}; `lm-eval ls tasks` lists them,"
            " --include DIR adds your own"
        )
    results = simple_evaluate(
        model=model,
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        bootstrap_iters=1000,
        verbosity="ERROR",
    )
    assert results is not None  # this process is the only one
    return {
        task: {
            metric.removesuffix(",none"): value
            for metric, value in values.items()
            if isinstance(value, float)
        }
        for task, values in results["results"].items()
    }
