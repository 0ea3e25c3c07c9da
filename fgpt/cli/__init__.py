"""`fgpt VERB ...`: the table of verbs; errors are one line on stderr.

Each verb imports its own modules, so that `fgpt --help` is fast.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from fgpt import __version__
from fgpt.errors import FgptError, printable
from fgpt.utils.console import protected_stderr
from fgpt.utils.keys import nearest

# verb -> (module, function of argv that returns the exit code, one line of help)
VERBS = {
    "check": (
        "fgpt.cli.check",
        "check_verb",
        "print the resolved configuration with the origin of each value, or every issue",
    ),
    "plan": (
        "fgpt.cli.plan",
        "plan_verb",
        "predict memory, time and cost of a run on a cluster, or choose its layout; needs no GPU",
    ),
    "doctor": (
        "fgpt.cli.doctor",
        "doctor_verb",
        "examine the machines before a run: versions, devices, network, disk, limits",
    ),
    "train": (
        "fgpt.cli.supervise",
        "train_verb",
        "run a launch command, and start it again from its newest checkpoint after a failure",
    ),
    "prepare": ("fgpt.cli.prepare", "prepare_verb", "turn a corpus into a data set for training"),
    "data": ("fgpt.cli.data", "data_verb", "inspect, verify, merge and import data sets"),
    "tokenizer": (
        "fgpt.cli.tokenizer",
        "tokenizer_verb",
        "train, try, inspect and compare tokenizers",
    ),
    "generate": ("fgpt.cli.generate", "generate_verb", "continue prompts with a trained model"),
    "eval": (
        "fgpt.cli.eval",
        "eval_verb",
        "the loss on a data set with its confidence interval, and suites of questions",
    ),
    "convert": ("fgpt.cli.convert", "convert_verb", "weights to and from Hugging Face"),
    "checkpoint": (
        "fgpt.cli.checkpoint",
        "checkpoint_verb",
        "inspect, verify, compare, average and upgrade checkpoints",
    ),
    "resume-check": (
        "fgpt.cli.resume_check",
        "resume_check_verb",
        "stop and resume your own run at several layouts, and compare it with the whole run",
    ),
    "soak": (
        "fgpt.cli.soak",
        "soak_verb",
        "kill, stop and damage a small run again and again, and compare it with a clean one",
    ),
    "parity": (
        "fgpt.cli.parity",
        "parity_verb",
        "compare layouts (tensor, pipeline, ... parallel) with one process, step by step",
    ),
    "bench": ("fgpt.cli.bench", "bench_verb", "measure the engines side by side on this machine"),
    "runs": ("fgpt.cli.report_runs", "runs_verb", "list training runs with their last line"),
    "report": (
        "fgpt.cli.report",
        "report_verb",
        "a page of training runs (curves, samples, configuration), or of what was measured",
    ),
}


def usage() -> str:
    """Return the text of `fgpt --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {line}" for verb, (_, _, line) in VERBS.items()]
    return "\n".join(
        [
            "usage: fgpt VERB [ARGUMENTS]    (fgpt VERB --help says more)",
            "",
            *lines,
            "",
            "Training is launchers/train.py, under python, deepspeed, torchrun or accelerate;",
            "fgpt train starts one of these again after failures.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the process's exit code (2 for wrong input)."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    texts = {"-h": usage, "--help": usage, "--version": lambda: f"fgpt {__version__}"}
    if verb in texts:
        return _guarded(lambda: _print(texts[verb]()))
    if verb not in VERBS:
        near = nearest(verb, VERBS)
        hint = f"did you mean {near}?" if near else f"verbs: {', '.join(VERBS)}"
        print(f"fgpt: unknown verb {ascii(verb)}; {hint}", file=sys.stderr)
        return 2
    module, function, _ = VERBS[verb]
    with protected_stderr(), _cleaned_up_on_sigterm():
        return _guarded(lambda: _run(module, function, rest))


@contextlib.contextmanager
def _cleaned_up_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the process with 143, after removing what it would leave unfinished.

    Not for a rank that a verb has started: it ends at once, also while C++ code waits.
    """
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the clean-up
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _print(text: str) -> int:
    print(text)
    return 0


def _run(module: str, function: str, arguments: list[str]) -> int:
    # imported here: `fgpt --help` reads no configuration
    from fgpt.cli.run_flags import with_home

    code: int = getattr(importlib.import_module(module), function)(with_home(arguments))
    return code


def _guarded(verb: Callable[[], int]) -> int:
    """Run a verb and flush its output; return its exit code, after a line for an error."""
    try:
        code = verb()
        sys.stdout.flush()  # here, where a failure is reported
        return code
    except FgptError as error:
        print(f"fgpt: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fgpt: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is not None:  # a path that no verb has checked
            path = printable(os.fsdecode(error.filename))
            print(f"fgpt: {path}: {error.strerror}; check the path", file=sys.stderr)
            return 2
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT):
            raise
        with contextlib.suppress(OSError):
            if error.errno != errno.EPIPE:  # `fgpt check | head` has read what it wanted
                print(f"fgpt: output cannot be written: {error.strerror}", file=sys.stderr)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
