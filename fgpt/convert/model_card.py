"""README.md of an exported model: what it is, what it was trained on, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fgpt import __version__
from fgpt.config.field_syntax import parse_blend
from fgpt.data.card import CARD_NAME, DataCard, load_card
from fgpt.errors import DataError, printable
from fgpt.inference.hf_layout import family_for
from fgpt.inference.source import WeightSource, without_folders
from fgpt.model.count import n_params
from fgpt.optim.optimizers import adam_rate, peak_rate
from fgpt.tokenizer.base import Tokenizer


def model_card(source: WeightSource, name: str, tokenizer: Tokenizer | None) -> str:
    """Return the text, with the front matter that the Hub reads."""
    config = source.config
    run: dict[str, Any] = (source.facts.run_config or {}).get("run", {})
    cards = data_cards(run)
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [fgpt]"]
    if source.facts.base_model:
        lines.append(f"base_model: {json.dumps(source.facts.base_model)}")  # also YAML
    lines += ["---", "", f"# {name}", ""]
    quoted = json.dumps(name, ensure_ascii=False)
    made = f"converted by FGPT {__version__} from"
    if source.facts.is_trained:
        made = f"trained with FGPT {__version__} and exported from"
    lines += [
        f"A {family_for(config).architecture} of {n_params(config):,} parameters, {made}"
        f" `{printable(source.path.name)}`.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({quoted})",
        f"tokenizer = AutoTokenizer.from_pretrained({quoted})",
        "```",
        "",
        "## Model",
        "",
        f"- {config.n_layer} blocks of width {config.d_model}, {config.n_head} heads, context of"
        f" {config.max_seq_len} tokens",
        f"- positions {config.position}, {config.norm}, {config.activation},"
        f" {'tied' if config.tied_head else 'untied'} head",
        _vocabulary(config.vocab_size, tokenizer),
        "",
        "## Training",
        "",
        *_training(source, run),
        "",
        "## Data",
        "",
        *([line for card in cards for line in _data(card)] or ["- not known"]),
    ]
    return "\n".join(lines) + "\n"


def data_cards(run: dict[str, Any]) -> list[DataCard]:
    """The cards of the run's data sets that are still there."""
    written = run.get("data", {}).get("path")
    paths = [Path(part.path) for part in parse_blend(written)] if isinstance(written, str) else []
    cards = []
    for path in paths:
        try:
            if (path / CARD_NAME).exists():
                cards.append(load_card(path))
        except DataError:  # of another version: the model card says less
            continue
    return cards


def _vocabulary(rows: int, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None or tokenizer.vocab_size == rows:
        return f"- vocabulary of {rows:,} ids"
    return (
        f"- vocabulary of {tokenizer.vocab_size:,} ids; the {rows - tokenizer.vocab_size:,} rows"
        f" beyond them (`vocab_size` is {rows:,}) are padding, which no text uses"
    )


def _training(source: WeightSource, run: dict[str, Any]) -> list[str]:
    facts, config = source.facts, source.facts.run_config or {}
    origin = printable(without_folders(facts.origin))
    lines = [f"- began with the weights {origin}"] if origin else []
    if not facts.is_trained:
        return lines or ["- not known"]
    if facts.step is not None and facts.tokens is not None:
        lines.append(f"- {facts.step:,} steps, {facts.tokens:,} tokens")
    if facts.is_average:
        decay = run.get("train", {}).get("ema")
        lines.append(f"- the weights are their moving average, decay {decay}")
    if facts.valid_loss is not None:
        lines.append(f"- validation loss {facts.valid_loss:.4f} nats per token")
    if batch := config.get("batch"):
        is_plain = run.get("train", {}).get("engine") == "plain"
        engine = "without DeepSpeed" if is_plain else f"DeepSpeed ZeRO-{config.get('zero_stage')}"
        grid = ", ".join(f"{axis} {batch.get(axis)}" for axis in ("dp", "tp", "pp", "cp"))
        lines.append(f"- {engine}, {config.get('precision')}, ranks: {batch.get('world')} ({grid})")
    if optimizer := config.get("deepspeed", {}).get("optimizer"):
        params = optimizer.get("params", {})
        lr, others = peak_rate(params), adam_rate(params)
        rest = f" (AdamW's part {others})" if others != lr else ""
        lines.append(f"- {optimizer.get('type')}, learning rate {lr}{rest}")
    return lines


def _data(card: DataCard) -> list[str]:
    recipe = card.recipe
    return [
        f"- {recipe.name}: {card.summary()}",
        f"  - licence: {recipe.licence or 'not stated'}",
        f"  - fingerprint: `{card.fingerprint()}`",
    ]
