"""Both conversions, from a source to a directory that is complete and proven, or not there."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fgpt.convert.export import export
from fgpt.convert.import_weights import import_weights
from fgpt.convert.model_card import model_card
from fgpt.convert.proof import (
    compare_logits,
    compare_stored,
    compare_tensors,
    tokenizer_problem,
    why_no_logits,
)
from fgpt.errors import CheckpointError, FgptError, UserError, printable
from fgpt.inference.hf_layout import family_for
from fgpt.inference.hf_weights import HuggingFaceWeights
from fgpt.inference.source import WeightSource
from fgpt.inference.weights import open_weights
from fgpt.tokenizer.base import Tokenizer
from fgpt.utils.files import LockHeldError, acquire_lock

LOCK = ".fgpt_convert.lock"
"""In a directory that is not complete; the process that writes it holds it."""


def to_hugging_face(
    source: WeightSource,
    out: Path,
    *,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    say: Callable[[str], None],
) -> None:
    """Export to the new directory `out`; `say` prints what was proven.

    Raises CheckpointError, UserError, TrainingError if the proof fails, OSError.
    """
    family_for(source.config)  # before anything is written
    with new_directory(out) as folder:
        export(source, folder, dtype, tokenizer)
        card = model_card(source, out.absolute().name, tokenizer)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if reason := why_no_logits(source):
            say(f"no logits compared: {reason}")
            written = HuggingFaceWeights(folder)
            proof = compare_tensors(source, written, dtype)
        else:
            proof = compare_logits(source, folder, dtype, tokenizer, source.path)
            if tokenizer is not None and (problem := tokenizer_problem(folder, tokenizer)):
                say(f"warning: the tokenizer: transformers {problem}: use FGPT's to encode text")
        proof.check()
        say(proof.text)


def from_hugging_face(
    source: WeightSource,
    out: Path,
    *,
    tokenizer: Tokenizer | None,
    say: Callable[[str], None],
) -> Path:
    """Import into the new run directory `out`; return its checkpoint.

    Raises as `to_hugging_face`.
    """
    if not isinstance(source, HuggingFaceWeights):
        raise CheckpointError(
            f"{source.path}: is FGPT's own already; --from hf reads a directory with config.json"
            " and model.safetensors"
        )
    with new_directory(out) as folder:
        written = import_weights(source, folder, tokenizer)
        opened = open_weights(folder)
        if reason := why_no_logits(source):
            say(f"no logits compared: {reason}")
            proof = compare_stored(source, opened)
        else:
            proof = compare_logits(opened, source.path, torch.float32, tokenizer, source.path)
        proof.check()
        say(proof.text)
    return out / written.relative_to(folder)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a directory that becomes `out` at the end, and is removed after an error, whose message
    then names `out`. What a killed conversion has left there is removed.

    Raises UserError if `out` exists, or another process writes it; OSError.
    """
    partial_dir = _partial_dir(out)
    try:
        if os.path.lexists(partial_dir):
            _remove_leftover(partial_dir, out)
        partial_dir.mkdir(parents=True)
        lock = acquire_lock(partial_dir / LOCK, wait=False)
    except LockHeldError as error:
        raise UserError(
            f"--out {out}: process {error.pid} is writing it; wait for it, or name another"
            " directory"
        ) from error
    except OSError as error:
        _name_out(error, partial_dir, out)
        raise
    try:
        yield partial_dir
        (partial_dir / LOCK).unlink()
        partial_dir.rename(out)
    except BaseException as error:
        shutil.rmtree(partial_dir, ignore_errors=True)
        _name_out(error, partial_dir, out)
        raise
    finally:
        lock.close()


def _partial_dir(out: Path) -> Path:
    """Raises UserError for a name that is there, that is none, or that cannot be printed."""
    path = out.absolute()
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in str(path)):
        raise UserError(
            f"--out {printable(str(out))}: {printable(str(path))} has control characters or bytes"
            " that are not UTF-8; name another directory"
        )
    if os.path.lexists(out):
        raise UserError(f"--out {out}: exists already; name a new directory")
    if path.name in ("", ".."):
        raise UserError(f"--out {out}: is no name of a new directory; name one")
    return path.with_name(path.name + ".tmp")


def _remove_leftover(partial_dir: Path, out: Path) -> None:
    """Remove the leftover of a killed conversion, whose lock file no process holds.

    Raises LockHeldError if it is held, UserError if it is not there.
    """
    path = partial_dir / LOCK
    if partial_dir.is_symlink() or path.is_symlink() or not path.is_file():
        raise UserError(
            f"--out {out}: is written as {partial_dir.name} first, which exists and which no"
            " conversion of FGPT has left; rename it, or name another directory"
        )
    with acquire_lock(path, wait=False):
        shutil.rmtree(partial_dir)


def _name_out(error: BaseException, partial_dir: Path, out: Path) -> None:
    """Put the path that the user knows into the error."""
    if isinstance(error, FgptError):
        error.args = tuple(
            arg.replace(str(partial_dir), str(out)) if isinstance(arg, str) else arg
            for arg in error.args
        )
    elif isinstance(error, OSError) and isinstance(error.filename, str | bytes | os.PathLike):
        error.filename = os.fsdecode(error.filename).replace(str(partial_dir), str(out))
