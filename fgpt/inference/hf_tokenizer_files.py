"""The tokenizer in a directory of Hugging Face, and what transformers puts in front of a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgpt.errors import CheckpointError, DataError
from fgpt.inference.hf_files import CONFIG, is_there, read_json_object
from fgpt.inference.hf_weights import FACTS
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.hf_tokenizer import HFTokenizer
from fgpt.tokenizer.load import load_tokenizer

SETTINGS = "tokenizer_config.json"


def load_hugging_face_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a model, with the end-of-document token that its settings name and
    its `prompt_prefix`.

    Raises CheckpointError if there is none or its settings are damaged, DataError if it is damaged.
    """
    files = [path / "tokenizer.json", *path.glob("*.model"), path / "vocab.json"]
    if not any(map(is_there, files)):
        raise CheckpointError(f"{path}: has no tokenizer: name it with --tokenizer FILE|DIR")
    for file in [*files, path / "merges.txt"]:
        if is_there(file) and not file.is_file():
            raise CheckpointError(
                f"{file}: is no file, nor a link to one; copy it there again, or name the tokenizer"
                " with --tokenizer FILE|DIR"
            )
    settings, config = (
        read_json_object(path / name) if is_there(path / name) else {}
        for name in (SETTINGS, CONFIG)
    )
    as_text = settings.get("split_special_tokens") is True
    # several files are one tokenizer in several formats; FGPT's export names the original
    own = config.get(FACTS)
    named = own.get("tokenizer") if isinstance(own, dict) else None
    file = path / ("tokenizer.model" if named == "tokenizer.model" else "tokenizer.json")
    chosen = file if file.exists() else path
    eod = _name(settings.get("eos_token"))
    tokenizer = load_tokenizer(chosen, "text" if as_text else "control", eod)
    tokenizer.prompt_prefix = _prompt_prefix(tokenizer, settings, config, path)
    return tokenizer


def _name(token: object) -> str | None:
    """The name of a special token in the settings, which may be an object with its options."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _prompt_prefix(
    tokenizer: Tokenizer, settings: Mapping[str, Any], config: Mapping[str, Any], path: Path
) -> tuple[int, ...]:
    # 1. a tokenizer.json says it itself; transformers then ignores add_bos_token
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.template_prefix
    # 2. a SentencePiece model alone: Llama's has a BOS by default
    kind = settings.get("tokenizer_class", config.get("model_type"))
    is_llama = kind in ("LlamaTokenizer", "LlamaTokenizerFast", "llama")
    if not settings.get("add_bos_token", is_llama):
        return ()
    name = _name(settings.get("bos_token")) or "<s>"
    bos = next((i for i in range(tokenizer.vocab_size) if tokenizer.id_to_token(i) == name), None)
    if bos is None:
        raise DataError(
            f"{path}: the tokenizer has no {name}, with which a text begins: correct bos_token in"
            f" {SETTINGS}, or set add_bos_token to false there"
        )
    return (bos,)
