"""One training run, put together: data -> engine -> hooks -> loop -> report.

Every function here is called by all ranks; what only one may do is the leader's.
"""

from __future__ import annotations

from fgpt.checkpoint.identity import run_identity
from fgpt.data.card import Prepared
from fgpt.data.loader import MicroBatches
from fgpt.data.samples import Samples
from fgpt.engine.base import Engine
from fgpt.engine.build import build_engine
from fgpt.engine.collect import any_rank
from fgpt.engine.launch import lost_rank
from fgpt.errors import LostRankError, TrainingError
from fgpt.model.count import n_params
from fgpt.train.finish import finish
from fgpt.train.hooks import Evaluation, NonFiniteGuard, Saver, weights_are_finite
from fgpt.train.loop import Hook, train
from fgpt.train.metrics import Metrics
from fgpt.train.start import Setting, Start, begin, check_agreement, open_data
from fgpt.train.stop import StopSignals


def run(setting: Setting, resume: str, *, accelerate: bool = False) -> int:
    """Train as configured; returns the exit code: 0, or 128 + the signal that stopped the run.

    `resume`: auto (the newest usable checkpoint of the run directory, if there is one), none (start
    afresh; an earlier run is moved aside), or the path of a checkpoint or of a run directory.
    Raises FgptError.
    """
    check_agreement(setting)
    prepared = open_data(setting)
    stop = StopSignals(setting.device)  # not before: preparing data is long, and simply ended
    identity = run_identity(setting.resolved, prepared.card.fingerprint())
    start = begin(setting, resume, identity)
    _introduce(setting, prepared)
    engine = build_engine(setting.resolved, setting.world, setting.device, accelerate=accelerate)
    try:
        if start.found is not None:
            start.checkpoints.load(engine, start.found)
        _train(setting, start, engine, prepared, identity, stop)
    except RuntimeError as error:
        if reason := lost_rank(error):
            raise LostRankError(
                f"after step {engine.step}: another rank is gone ({reason}); newest checkpoint:"
                f" {start.checkpoints.newest() or 'none'}; go on with --resume auto"
            ) from error
        raise
    finally:
        engine.close()
    return stop.exit_code


def _train(
    setting: Setting,
    start: Start,
    engine: Engine,
    prepared: Prepared,
    identity: dict[str, object],
    stop: StopSignals,
) -> None:
    options, console = setting.resolved.run, setting.console
    batches, valid_batches, n_valid = _batches(setting, prepared)
    metrics = None
    if start.run_dir is not None:
        file = start.run_dir.path / "metrics.jsonl"
        metrics = Metrics(setting.resolved, engine, file, console, setting.device)

    def save() -> None:
        if any_rank(not weights_are_finite(engine.model), setting.device):
            raise TrainingError(f"step {engine.step}: the weights are not finite")
        if metrics is not None:
            metrics.flush()
        path = start.checkpoints.save(
            engine,
            samples_seen=engine.step * batches.global_batch,
            identity=identity,
            config=setting.resolved.to_json(),
        )
        console.print(f"step {engine.step:>6}/{options.train.steps}  saved {path}", highlight=False)

    def evaluated(step: int, loss: float) -> None:
        if metrics is not None:
            metrics.evaluated(step, loss)

    def warn(text: str) -> None:
        console.print(f"[bold red]{text}[/bold red]", highlight=False)

    dump = None if start.run_dir is None else start.run_dir.path
    guard = NonFiniteGuard(batches, options.train.max_skipped, dump)
    evaluation = Evaluation(engine, valid_batches, n_valid, options.eval.every, evaluated)
    saver = Saver(engine, options.checkpoint.every, save, warn)
    hooks: list[Hook] = [*([metrics] if metrics else []), guard, evaluation, saver]
    try:
        if engine.step == 0:
            evaluation.now()
        else:
            saver.saved_step = evaluation.last_step = engine.step
        train(
            engine, batches, hooks,
            last_step=options.train.steps, should_stop=stop, rank=setting.world.rank,
        )  # fmt: skip
        if not stop.stopping:
            evaluation.now()
        saver.last()
    finally:
        batches.close()
        valid_batches.close()
        if metrics is not None:
            metrics.close()
    if stop.stopping:
        console.print(f"stopped by a signal after step {engine.step}; go on with --resume auto")
    else:
        finish(setting, engine, prepared, saver.saved_step)


def _batches(setting: Setting, prepared: Prepared) -> tuple[MicroBatches, MicroBatches, int]:
    """Training and validation batches of this rank, and how many global ones make an evaluation."""
    data, batch = setting.resolved.run.data, setting.resolved.batch
    assert data.seq_len is not None  # resolved
    train_samples = Samples(prepared.train, data.seq_len, seed=data.seed, shuffle=True)
    # a fixed draw from the whole split, not its first documents
    valid_samples = Samples(prepared.valid, data.seq_len, seed=0, shuffle=True)

    def view(samples: Samples) -> MicroBatches:
        return MicroBatches(
            samples,
            micro=batch.micro,
            accumulation=batch.accumulation,
            dp_rank=setting.world.rank,
            dp_size=batch.dp,
        )

    # a small split is read once, not over and over
    n_valid = min(setting.resolved.run.eval.batches, valid_samples.per_epoch // batch.global_)
    return view(train_samples), view(valid_samples), max(1, n_valid)


def _introduce(setting: Setting, prepared: Prepared) -> None:
    resolved = setting.resolved
    model, card = resolved.run.model, prepared.card
    say = setting.console.print
    say(
        f"[bold]{model.preset}[/bold]: {n_params(model):,} parameters, {resolved.precision},"
        f" ZeRO stage {resolved.zero_stage}, {setting.world.size} rank(s) on {setting.device.type}",
        highlight=False,
    )
    say(
        f"{prepared.path}: {card.train.tokens:,} training and {card.valid.tokens:,} validation"
        f" tokens, vocabulary {card.tokenizer.vocab_size:,}",
        highlight=False,
    )
    say(resolved.batch.explain(), highlight=False)
