"""The length of a run: train.steps, or what it follows from (train.tokens, train.epochs)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from fgpt.config.batch import Batch, BatchRamp
from fgpt.config.field_syntax import parse_blend, ramp_error
from fgpt.config.run_file import LoadedRun, set_field
from fgpt.errors import ConfigIssue, Edit
from fgpt.utils.keys import shown

STEPS, TOKENS, EPOCHS = "train.steps", "train.tokens", "train.epochs"


def settle_length(
    loaded: LoadedRun, batch: Batch | None, tokens_of: Callable[[str], int | None] | None
) -> Iterator[ConfigIssue]:
    """Set train.steps from train.tokens or train.epochs; yields what prevents it.

    `batch`: None where the batch sizes are wrong, which is reported elsewhere. `tokens_of`: returns
    the training tokens of a prepared data set; None: it is not prepared.
    """
    train = loaded.run.train
    written = {TOKENS: train.tokens, EPOCHS: train.epochs}
    if loaded.origins[STEPS].startswith(("file ", "flag ")):
        written[STEPS] = train.steps
    lengths = {field: value for field, value in written.items() if value is not None}
    if len(lengths) > 1:
        what = " and ".join(f"{field} {shown(value)}" for field, value in lengths.items())
        edits = tuple(Edit(f"run.{field}") for field in list(lengths)[1:])
        fix = "write one of them: the others follow from it"
        yield ConfigIssue("run file", what, fix, edits=edits)
        return
    tokens = train.tokens
    if train.epochs is not None:
        path = loaded.run.data.path
        is_one = len(parse_blend(path)) == 1 and loaded.run.data.stages is None
        known = tokens_of(path) if is_one and tokens_of is not None else None
        if known is None:
            why = "which is a blend or not prepared yet"
            if loaded.run.data.stages is not None:
                why = "in the first of several stages (data.stages)"
            what = f"{shown(train.epochs)} of {path}, {why}"
            fix = f"prepare one data set first, or write {TOKENS}"
            where = f"{EPOCHS} ({loaded.origins[EPOCHS]})"
            yield ConfigIssue(where, what, fix, edits=(Edit(f"run.{EPOCHS}"),))
            return
        tokens = train.epochs * known
    if tokens is None or batch is None:
        return
    seq_len = loaded.run.data.seq_len or loaded.run.model.max_seq_len
    (field,) = lengths
    how, text = f"{batch.global_size * seq_len} tokens per step", train.batch_ramp
    if text is not None:
        how = "the tokens per step of train.batch_ramp"
    ramp = BatchRamp.of(None if text is None or ramp_error(text) else text, batch)  # a rule says
    loaded.run = set_field(loaded.run, STEPS, ramp.steps_for(math.ceil(tokens / seq_len)))
    loaded.origins[STEPS] = f"derived: {field} / {how}"
