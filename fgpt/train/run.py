"""One training run: data -> engine -> hooks -> loop -> report. All ranks call every function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import psutil

from fgpt.checkpoint.identity import run_identity
from fgpt.checkpoint.manager import ResumePoint
from fgpt.checkpoint.manifest import SaveInfo
from fgpt.checkpoint.size import copy_bytes, why_not_in_background
from fgpt.config.batch import BatchRamp
from fgpt.data.loader import MicroBatches
from fgpt.data.token_dataset import BlendedDataset
from fgpt.distributed.agreements import any_rank, run_on_rank0
from fgpt.distributed.launch import lost_rank_reason
from fgpt.distributed.peers import watch_peers
from fgpt.engine.base import Engine
from fgpt.engine.build import build_engine
from fgpt.errors import LaunchError, LostRankError, TrainingError
from fgpt.parallel.topology import Grid
from fgpt.train.hooks import BestSaver, Evaluation, NonFiniteGuard, Saver, weights_are_finite
from fgpt.train.loop import Action, Hook, StopSignals, train
from fgpt.train.metrics import Metrics
from fgpt.train.preflight import preflight
from fgpt.train.resume import ResumePlan, claim_run_dir, plan_resume
from fgpt.train.run_dir import METRICS
from fgpt.train.startup import RunContext, open_data, print_header

if TYPE_CHECKING:
    from fgpt.evaluation.questions import QuestionFile


def _ignore(engine: Engine, point: ResumePoint) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Observer:
    """What a caller of `run` sees of it while it trains: `fgpt resume-check` compares two runs."""

    make_batches: Callable[..., MicroBatches] = MicroBatches
    """Makes the training split's micro-batches, with the arguments of `MicroBatches`."""
    on_load: Callable[[Engine, ResumePoint], None] = _ignore
    """Called on all ranks when a checkpoint is loaded, before the first step."""


def run(
    context: RunContext,
    resume: str,
    *,
    allow: Collection[str] = (),
    accelerate: bool = False,
    observer: Observer | None = None,
) -> int:
    """Train as configured; returns the exit code: 0, or 128 + the signal that stopped the run.

    `resume`: auto (the newest usable checkpoint of the run directory, if there is one), none (start
    afresh; an earlier run is renamed), or the path of a checkpoint or of a run directory.
    `allow`: what may differ from the checkpoint (`fgpt.checkpoint.identity.ALLOWABLE`).
    Raises FgptError.
    """
    preflight(context, resume)
    observer = observer or Observer()
    with ExitStack() as watch:
        watch.enter_context(watch_peers(context.world, context.device))
        data = open_data(context)
        suites = _read_suites(context)
        stop = StopSignals(context.device)  # until here a signal ends the process at once
        stages = data.stage_identity(context.resolved.seq_len)
        identity = run_identity(context.resolved, data.fingerprint(), stages)
        plan = plan_resume(context, resume, identity, allow)
        print_header(context, data)
        if plan.weights is not None:
            context.print(f"starting from the weights of {plan.weights.describe()}")
            if warning := plan.weights.tokenizer_warning(data.tokenizer):
                context.print(warning, "bold red")
        resolved, world = context.resolved, context.world
        engine = build_engine(resolved, world, context.device, accelerate=accelerate)
        with _closing(engine, plan):
            if plan.resume_point is not None:
                plan.checkpoints.load(engine, plan.resume_point, plan.states)
                observer.on_load(engine, plan.resume_point)
            elif plan.weights is not None:
                plan.weights.load(engine, context)
            saved_step = _train(context, plan, engine, data, identity, suites, stop, observer)
            if not stop.stopping:
                from fgpt.train.finish import finish, last_sample  # only needed at the end

                sample = last_sample(context, engine, data)
                watch.close()  # only rank 0 still has a report to write
                finish(context, engine, data.name, sample, saved_step)
    return stop.exit_code


@contextmanager
def _closing(engine: Engine, plan: ResumePlan) -> Iterator[None]:
    """Close the engine at the end, unless a rank is lost: closing would wait for it.

    Raises LostRankError, naming the newest checkpoint, if torch reports a lost connection.
    """
    lost = False
    try:
        yield
    except LostRankError:
        lost = True
        raise
    except RuntimeError as error:
        if reason := lost_rank_reason(error):
            lost = True
            raise LostRankError(
                f"after step {engine.step}: another rank is gone ({reason}); newest checkpoint:"
                f" {plan.checkpoints.directory.newest() or 'none'}; continue with --resume auto"
            ) from error
        raise
    finally:
        if not lost:
            engine.close()


def _train(
    context: RunContext,
    plan: ResumePlan,
    engine: Engine,
    data: BlendedDataset,
    identity: dict[str, object],
    suites: Sequence[QuestionFile],
    stop: StopSignals,
    observer: Observer,
) -> int | None:
    """Train up to the last step or a signal; returns the step of the last checkpoint."""
    options = context.resolved.run
    with ExitStack() as closing:
        batches = closing.enter_context(
            _micro_batches(
                context,
                data,
                "train",
                seed=options.data.seed,
                ramp=context.resolved.ramp,
                origin=plan.origin,
                make=observer.make_batches,
            )
        )
        # seed 0: a fixed sample of the whole split, not its first documents
        valid = closing.enter_context(_micro_batches(context, data, "valid", seed=0))
        claim_run_dir(context, plan, data.tokenizer)
        warn = partial(context.print, style="bold red")
        settings, path = context.resolved.settings, context.path
        run_on_rank0(lambda: engine.open_monitors(settings, path, warn), context.device)
        metrics = dump_dir = None
        if plan.run_dir is not None:
            dump_dir = plan.run_dir.path
            file = dump_dir / METRICS
            metrics = Metrics(
                context.resolved,
                engine,
                file,
                context.console,
                context.device,
                plan.tokens_before,
            )
            closing.callback(metrics.close)
        evaluation = Evaluation(engine, valid, options.eval, metrics)
        saver = Saver(
            engine,
            options.checkpoint.every,
            plan.checkpoints,
            _make_save_info(context, plan, evaluation, identity, batches, metrics),
            last_step=options.train.steps,
            background=_saves_in_background(context),
            report=context.print,
        )
        guard = NonFiniteGuard(batches, options.train.max_skipped, dump_dir, saver.newest)
        decoding = _decoding(context, engine, data, suites, metrics, stop)
        if engine.step == 0:
            for action in (evaluation, *decoding):
                action.run()
        else:
            evaluation.evaluated_step = engine.step
            for action in decoding:  # what a signal has kept them from
                if action.every and engine.step % action.every == 0:
                    action.run()
        if plan.is_saved_here:
            saver.begun_step = saver.saved_step = engine.step
        elif engine.step > 0:
            saver.save_unless_saved()  # a restart with --resume auto must find it
        hooks: list[Hook] = [*([metrics] if metrics else []), guard]
        last_step, rank = options.train.steps, context.world.rank
        if engine.step >= last_step:
            context.print(f"already at step {engine.step} of {last_step}: raise --steps")
        # the checkpoint first: answering long suites may take longer than a signal allows
        actions: list[Action] = [evaluation, saver, *decoding]
        if options.checkpoint.best:
            lowest = run_on_rank0(plan.checkpoints.directory.lowest_valid_loss, context.device)
            actions.insert(1, BestSaver(evaluation, saver, lowest))
        train(
            engine,
            batches,
            hooks,
            actions,
            last_step=last_step,
            should_stop=stop,
            after_step=saver.commit_if_written,
            rank=rank,
        )
        if not stop.stopping:
            evaluation.run()
        saver.save_unless_saved()
        for action in () if stop.stopping else decoding:
            action.run()
    if stop.stopping:
        context.print(f"stopped by a signal after step {engine.step}; continue with --resume auto")
    return saver.saved_step


def _read_suites(context: RunContext) -> list[QuestionFile]:
    """The files of `eval.suites`. Raises DataError."""
    if not context.resolved.run.eval.suites:
        return []
    from fgpt.train.decoding import read_suites  # rarely needed

    return read_suites(context)


def _decoding(
    context: RunContext,
    engine: Engine,
    data: BlendedDataset,
    suites: Sequence[QuestionFile],
    metrics: Metrics | None,
    should_stop: Callable[[], bool],
) -> list[Action]:
    """The actions that decode with the model, where the configuration has them."""
    options = context.resolved.run.sample
    writes_samples = options.every > 0 and options.tokens > 0
    if not suites and not writes_samples:
        return []
    from fgpt.train.decoding import SampleWriter, SuiteEvaluation  # rarely needed

    actions: list[Action] = []
    if suites:
        actions.append(
            SuiteEvaluation(context, engine, data.tokenizer, suites, metrics, should_stop)
        )
    if writes_samples:
        actions.append(SampleWriter(context, engine, data))
    return actions


def _saves_in_background(context: RunContext) -> bool:
    """Whether copies of the state fit into the memory of every node; warns where they do not.

    Raises LaunchError instead if the configuration asks for them (`checkpoint.async`).
    """
    resolved = context.resolved
    if why_not_in_background(resolved):
        return False
    needed = copy_bytes(resolved, context.world.local_size)
    free = psutil.virtual_memory().available
    if not any_rank(needed > free, context.device):
        return True
    text = (
        f"checkpoint.async: the copies of the state need {needed / 2**30:.1f} GiB of a node's"
        f" memory, and {free / 2**30:.1f} GiB of rank 0's are free"
    )
    if resolved.origins["run.checkpoint.async"] != "default":
        raise LaunchError(f"{text}: leave it out, or set it to false")
    context.print(f"warning: {text}: training waits for each save")
    return False


def _make_save_info(
    context: RunContext,
    plan: ResumePlan,
    evaluation: Evaluation,
    identity: dict[str, object],
    batches: MicroBatches,
    metrics: Metrics | None,
) -> Callable[[], SaveInfo]:
    """Return the function that describes a checkpoint of the current step, before it is written.

    It raises TrainingError if the weights are not finite.
    """
    engine, resolved = evaluation.engine, context.resolved

    def info() -> SaveInfo:
        if any_rank(not weights_are_finite(engine.model), context.device):
            raise TrainingError(f"step {engine.step}: the weights are not finite")
        if metrics is not None:
            metrics.flush()
        position = batches.samples_seen(engine.step)
        return SaveInfo(
            samples_seen=position,
            tokens_seen=plan.tokens_before + (position - plan.origin[1]) * resolved.seq_len,
            identity=identity,
            config=resolved.to_json(),
            optimizer=str(resolved.deepspeed["optimizer"]["type"]),
            history=plan.history,
            valid_loss=evaluation.current_loss,
        )

    return info


def _micro_batches(
    context: RunContext,
    data: BlendedDataset,
    split: str,
    *,
    seed: int,
    ramp: BatchRamp | None = None,
    origin: tuple[int, int] = (0, 0),
    make: Callable[..., MicroBatches] = MicroBatches,
) -> MicroBatches:
    """Return this rank's micro-batches of one split; `ramp`, `origin`: see `MicroBatches`."""
    batch, options = context.resolved.batch, context.resolved.run.data
    return make(
        data.samples(split, options, context.resolved.seq_len, seed=seed),
        micro=batch.micro,
        accumulation=batch.accumulation,
        ramp=ramp,
        dp_rank=Grid.of(batch).coordinates(context.world.rank).data,
        dp_size=batch.dp,
        prefetch=options.prefetch,
        reset_positions=options.reset_positions,
        pin=context.device.type == "cuda",
        origin=origin,
    )
