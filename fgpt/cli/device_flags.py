"""--device and --dtype of the verbs that read a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fgpt.errors import UserError

if TYPE_CHECKING:
    import torch


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Add both flags."""
    add = parser.add_argument
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU, else fp32")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")


def chosen_device(arguments: argparse.Namespace) -> str:
    """Return cpu or cuda. Raises UserError for a GPU that is not there."""
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here: use --device cpu")
    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


def chosen_dtype(arguments: argparse.Namespace, device: str) -> torch.dtype:
    """Return torch's dtype."""
    from fgpt.engine.base import DTYPES

    return DTYPES[arguments.dtype or ("bf16" if device == "cuda" else "fp32")]
