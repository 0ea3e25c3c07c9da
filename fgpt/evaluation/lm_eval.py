"""FGPT's models in lm-evaluation-harness (the extra `fgpt[lm-eval]`), registered as `fgpt`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fgpt.errors import UserError
from fgpt.evaluation.likelihood import Continuation, log_likelihoods
from fgpt.inference.decoder import Decoder
from fgpt.inference.generate import Limits, Row, generate
from fgpt.inference.sampling import Sampling
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

    @property
    def eot_token_id(self) -> int:
        """The id that stands before a text without context."""
        return self.fgpt_tokenizer.eod_id

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
        texts = []
        for number, (context, options) in enumerate(request.args for request in requests):
            until = options.get("until") or []
            stop = tuple(filter(None, [until] if isinstance(until, str) else until))
            n_tokens = int(options.get("max_gen_toks", DEFAULT_TOKENS))
            temperature = (
                float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            )
            row = Row(self.tok_encode(context) or [self.eot_token_id], number)
            sampling = Sampling(temperature=temperature)
            limits = Limits(n_tokens, stop)
            (found,) = generate(self.decoder, self.fgpt_tokenizer, [row], sampling, limits)
            texts.append(found.text)
        return texts


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
