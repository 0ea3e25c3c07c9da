"""One training run: data -> engine -> hooks -> loop -> report. All ranks call every function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import psutil

from fgpt.checkpoint.identity import run_identity
from fgpt.checkpoint.manager import ResumePoint
from fgpt.checkpoint.manifest import SaveInfo
from fgpt.checkpoint.size import copy_bytes, why_not_in_background
from fgpt.data.loader import MicroBatches
from fgpt.data.token_dataset import BlendedDataset
from fgpt.distributed.agreements import any_rank, run_on_rank0
from fgpt.distributed.launch import default_store
from fgpt.distributed.peers import watch_peers
from fgpt.distributed.progress import PREPARING, SAMPLING, SAVING, STARTING, Progress
from fgpt.distributed.watchdog import Watchdog
from fgpt.engine.base import Engine
from fgpt.engine.build import build_engine
from fgpt.errors import LaunchError, TrainingError
from fgpt.train.failure import FailureReport
from fgpt.train.hooks import BestSaver, Evaluation, NonFiniteGuard, Saver, weights_are_finite
from fgpt.train.loop import Action, Hook, train
from fgpt.train.metrics import Metrics
from fgpt.train.preflight import preflight
from fgpt.train.resume import ResumePlan, claim_run_dir, plan_resume
from fgpt.train.run_dir import METRICS
from fgpt.train.startup import (
    RunContext,
    make_micro_batches,
    open_data,
    print_header,
    skipped_samples,
)
from fgpt.train.stop_signals import StopSignals

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
    exits: bool = False,
) -> int:
    """Train as configured; returns the exit code: 0, or 128 + the signal that stopped the run.

    `resume`: auto (the newest usable checkpoint of the run directory, if there is one), none (start
    afresh; an earlier run is renamed), or the path of a checkpoint or of a run directory.
    `allow`: what may differ from the checkpoint (`fgpt.checkpoint.identity.ALLOWABLE`). `exits`: an
    error of this rank alone ends the process (`FailureReport`). Raises FgptError.
    """
    observer = observer or Observer()
    progress = Progress()
    report = FailureReport(context.world, progress, exits=exits)
    with ExitStack() as watch, report.reporting():
        if resume == "auto" and context.path.is_dir():
            report.run_dir = context.path
        preflight(context, resume)
        watch_progress(context, report, watch)
        with progress.during(PREPARING):
            data = open_data(context)
        suites = _read_suites(context)
        # until here a signal ends the process at once
        grace_s = context.resolved.run.train.grace_s
        stop = StopSignals(context.device, progress, grace_s, report.end)
        watch.callback(stop.close)
        stages = data.stage_identity(context.resolved.seq_len)
        identity = run_identity(context.resolved, data.fingerprint(), stages)
        plan = plan_resume(context, resume, identity, allow)
        report.newest = plan.checkpoints.directory.newest
        print_header(context, data)
        if plan.weights is not None:
            context.print(f"starting from the weights of {plan.weights.describe()}")
            if warning := plan.weights.tokenizer_warning(data.tokenizer):
                context.print(warning, "bold red")
        resolved, world = context.resolved, context.world
        engine = build_engine(resolved, world, context.device, accelerate=accelerate)
        progress.enter(STARTING, engine.step)
        with _closing(engine, report):
            if plan.resume_point is not None:
                plan.checkpoints.load(engine, plan.resume_point, plan.states)
                observer.on_load(engine, plan.resume_point)
            elif plan.weights is not None:
                plan.weights.load(engine, context)
            saved_step = _train(
                context, plan, engine, data, identity, suites, stop, observer, report
            )
            if not stop.stopping:
                from fgpt.train.finish import finish, last_sample  # only needed at the end

                with progress.during(SAMPLING), report.reporting():
                    sample = last_sample(context, engine, data)
                watch.close()  # only rank 0 still has a report to write
                finish(context, engine, data.name, sample, saved_step)
    return stop.exit_code


def watch_progress(context: RunContext, report: FailureReport, until: ExitStack) -> None:
    """Watch the other ranks' lives and all ranks' progress until the stack is closed."""
    world, device = context.world, context.device

    def leave(reason: str) -> NoReturn:
        watchdog.tell(reason)
        report.leave(reason)

    kill_stopped = until.enter_context(watch_peers(world, device, leave))
    watchdog = Watchdog(
        world,
        report.progress,
        context.resolved.run.train.watchdog_s,
        leave=report.leave,
        kill=kill_stopped,
        stacks=context.path / "stacks",
    )
    watchdog.start(device, default_store())
    until.callback(watchdog.stop)
    report.tell = watchdog.tell


@contextmanager
def _closing(engine: Engine, report: FailureReport) -> Iterator[None]:
    """Close the engine at the end; after an error of one rank this would wait for the others."""
    try:
        with report.reporting():
            yield
    except Exception as error:
        if report.is_agreed(error):
            engine.close()
        raise
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
    report: FailureReport,
) -> int | None:
    """Train up to the last step or a signal; returns the step of the last checkpoint."""
    options, progress = context.resolved.run, report.progress
    with ExitStack() as closing, report.reporting():
        batches = closing.enter_context(
            make_micro_batches(
                context,
                data,
                "train",
                seed=options.data.seed,
                ramp=context.resolved.ramp,
                origin=plan.origin,
                make=partial(observer.make_batches, skipped=skipped_samples(context)),
            )
        )
        # seed 0: a fixed sample of the whole split, not its first documents
        valid = closing.enter_context(make_micro_batches(context, data, "valid", seed=0))
        claim_run_dir(context, plan, data.tokenizer)
        report.run_dir = context.path
        report.samples = lambda step: batches.sample_ids(step).ravel().tolist()
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
            report.flush = metrics.flush
        evaluation = Evaluation(engine, valid, options.eval, metrics, progress)
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

        def perform(*actions: Action) -> None:
            for action in actions:
                with progress.during(action.phase):
                    action.run()

        def should_stop() -> bool:
            progress.tick()
            return stop()

        decoding = _decoding(context, engine, data, suites, metrics, should_stop)
        if engine.step == 0:
            perform(evaluation, *decoding)
        else:
            evaluation.evaluated_step = engine.step
            # what a signal has kept them from
            perform(*(a for a in decoding if a.every and engine.step % a.every == 0))
        if plan.is_saved_here:
            saver.begun_step = saver.saved_step = engine.step
        elif engine.step > 0:
            with progress.during(SAVING):
                saver.save_unless_saved()  # a restart with --resume auto must find it
        hooks: list[Hook] = [*([metrics] if metrics else []), guard]
        if options.train.max_loss_jump:
            from fgpt.train.loss_jump import make_loss_jump_guard  # rarely needed

            hooks.append(make_loss_jump_guard(context, batches, saver.newest))
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
            progress=progress,
        )
        if not stop.stopping:
            perform(evaluation)
        with progress.during(SAVING):
            saver.save_unless_saved()
        if not stop.stopping:
            perform(*decoding)
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
        return SaveInfo(
            samples_seen=batches.samples_seen(engine.step),
            tokens_seen=plan.tokens_before + batches.samples_read(engine.step) * resolved.seq_len,
            identity=identity,
            config=resolved.to_json(),
            optimizer=str(resolved.deepspeed["optimizer"]["type"]),
            history=plan.history,
            valid_loss=evaluation.current_loss,
        )

    return info
