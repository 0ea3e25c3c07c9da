"""One training run, put together: data -> engine -> hooks -> loop -> report.

Every function here is called by all ranks; what only one may do is the leader's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from fgpt.checkpoint.identity import run_identity
from fgpt.data.dataset_mixture import Mixture
from fgpt.data.loader import MicroBatches
from fgpt.distributed.agreements import any_rank
from fgpt.distributed.launch import lost_rank
from fgpt.distributed.peers import watch_peers
from fgpt.engine.base import Engine
from fgpt.engine.build import build_engine
from fgpt.errors import CheckpointError, LostRankError, TrainingError
from fgpt.model.count import n_params
from fgpt.parallel.topology import Grid
from fgpt.plan.memory import render_stages, stage_table
from fgpt.train.finish import engine_name, finish
from fgpt.train.hooks import Evaluation, NonFiniteGuard, Saver, weights_are_finite
from fgpt.train.loop import Hook, train
from fgpt.train.metrics import Metrics
from fgpt.train.startup import (
    ResumePlan,
    RunContext,
    begin,
    check_agreement,
    claim_run_dir,
    open_data,
)
from fgpt.train.stop_signals import StopSignals


def run(context: RunContext, resume: str, *, accelerate: bool = False) -> int:
    """Train as configured; returns the exit code: 0, or 128 + the signal that stopped the run.

    `resume`: auto (the newest usable checkpoint of the run directory, if there is one), none (start
    afresh; an earlier run is moved aside), or the path of a checkpoint or of a run directory.
    Raises FgptError.
    """
    check_agreement(context)
    with ExitStack() as watched:
        watched.enter_context(watch_peers(context.world, context.device))
        data = open_data(context)
        stop = StopSignals(context.device)  # not before: preparing data is long, and simply ended
        identity = run_identity(context.resolved, data.fingerprint())
        start = begin(context, resume, identity)
        _introduce(context, data)
        resolved, world = context.resolved, context.world
        engine = build_engine(resolved, world, context.device, accelerate=accelerate)
        with _in_use(engine, start):
            if start.found is not None:
                start.checkpoints.load(engine, start.found)
            saved_step = _train(context, start, engine, data, identity, stop)
            watched.close()  # ranks without a report to write end sooner
            if not stop.stopping:
                finish(context, engine, data, saved_step)
    return stop.exit_code


@contextmanager
def _in_use(engine: Engine, start: ResumePlan) -> Iterator[None]:
    """Close the engine in the end, unless a rank is lost: that would wait for it.

    Raises LostRankError, with what is left of the run, where torch's error means a lost rank.
    """
    lost = False
    try:
        yield
    except LostRankError:
        lost = True
        raise
    except RuntimeError as error:
        if reason := lost_rank(error):
            lost = True
            raise LostRankError(
                f"after step {engine.step}: another rank is gone ({reason}); newest checkpoint:"
                f" {start.checkpoints.newest() or 'none'}; go on with --resume auto"
            ) from error
        raise
    finally:
        if not lost:
            engine.close()


def _train(
    context: RunContext,
    start: ResumePlan,
    engine: Engine,
    data: Mixture,
    identity: dict[str, object],
    stop: StopSignals,
) -> int | None:
    """Train up to the last step, or until a signal; the step of the last checkpoint."""
    options, console = context.resolved.run, context.console
    with ExitStack() as open_until_the_end:
        batches = open_until_the_end.enter_context(
            _view(context, data, "train", seed=options.data.seed)
        )
        # a fixed draw from the whole split, not its first documents
        valid = open_until_the_end.enter_context(_view(context, data, "valid", seed=0))
        claim_run_dir(context, start)
        metrics = dump = None
        if start.run_dir is not None:
            dump = start.run_dir.path
            file = dump / "metrics.jsonl"
            metrics = Metrics(context.resolved, engine, file, console, context.device)
            open_until_the_end.callback(metrics.close)
        save = _saving(context, start, engine, identity, batches, metrics)
        guard = NonFiniteGuard(batches, options.train.max_skipped, dump)
        evaluation = Evaluation(engine, valid, options.eval, metrics)
        warn = partial(context.say, style="bold red")
        saver = Saver(engine, options.checkpoint.every, save, warn)
        if engine.step == 0:
            evaluation.now()
        else:
            saver.saved_step = evaluation.last_step = _position(start, batches, engine)
        hooks: list[Hook] = [*([metrics] if metrics else []), guard]
        last_step, rank = options.train.steps, context.world.rank
        if engine.step >= last_step:
            context.say(f"already at step {engine.step} of {last_step}: raise --steps to go on")
        actions = (evaluation, saver)
        train(engine, batches, hooks, actions, last_step=last_step, should_stop=stop, rank=rank)
        if not stop.stopping:
            evaluation.now()
        saver.save_final()
    if stop.stopping:
        context.say(f"stopped by a signal after step {engine.step}; go on with --resume auto")
    return saver.saved_step


def _position(start: ResumePlan, batches: MicroBatches, engine: Engine) -> int:
    """The step to go on from: the engine's, which must be where the checkpoint's data end."""
    assert start.found is not None  # or the engine would be at step 0
    position = batches.step_at(start.found.manifest.samples_seen)
    if position != engine.step:
        raise CheckpointError(
            f"{start.found.path}: the engine is at step {engine.step}, the data at step {position}"
        )
    return position


def _saving(
    context: RunContext,
    start: ResumePlan,
    engine: Engine,
    identity: dict[str, object],
    batches: MicroBatches,
    metrics: Metrics | None,
) -> Callable[[], None]:
    """The function that commits a checkpoint of the engine's current step. Raises TrainingError."""

    def save() -> None:
        if any_rank(not weights_are_finite(engine.model), context.device):
            raise TrainingError(f"step {engine.step}: the weights are not finite")
        if metrics is not None:
            metrics.flush()
        path = start.checkpoints.save(
            engine,
            samples_seen=engine.step * batches.global_batch,
            identity=identity,
            config=context.resolved.to_json(),
        )
        of = context.resolved.run.train.steps
        context.say(f"step {engine.step:>6}/{of}  saved {path}")

    return save


def _view(context: RunContext, data: Mixture, split: str, *, seed: int) -> MicroBatches:
    """This rank's micro-batches of one split."""
    batch, options = context.resolved.batch, context.resolved.run.data
    return MicroBatches(
        data.samples(split, options, context.resolved.seq_len, seed=seed),
        micro=batch.micro,
        accumulation=batch.accumulation,
        dp_rank=Grid.of(batch).coordinates(context.world.rank).data,
        dp_size=batch.dp,
        prefetch=options.prefetch,
        reset_positions=options.reset_positions,
        pin=context.device.type == "cuda",
    )


def _introduce(context: RunContext, data: Mixture) -> None:
    resolved = context.resolved
    model = resolved.run.model
    context.say(
        f"{model.preset}: {n_params(model):,} parameters, {engine_name(resolved)},"
        f" {context.world.size} rank(s) on {context.device.type}"
    )
    n_samples = resolved.run.train.steps * resolved.batch.global_size
    for line in data.usage(resolved.seq_len, n_samples):
        context.say(line)
    context.say(resolved.batch.explain())
    if resolved.batch.pp > 1:
        render_stages(stage_table(resolved), context.console)
