"""One training run: data -> engine -> hooks -> loop -> report. All ranks call every function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

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
from fgpt.train.failure import FailureReport, reason_of
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
from fgpt.utils.deadlines import exit_after

if TYPE_CHECKING:
    from fgpt.evaluation.questions import QuestionFile

CLOSE_S = 60.0


def _ignore(engine: Engine, point: ResumePoint) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Observer:
    """What a caller of `run` sees of it while it trains: `fgpt resume-check` compares two runs."""

    make_batches: Callable[..., MicroBatches] = MicroBatches
    """Makes the training split's micro-batches, with the arguments of `MicroBatches`."""
    on_load: Callable[[Engine, ResumePoint], None] = _ignore
    """Called on all ranks when a checkpoint is loaded, before the first step."""


@dataclass(frozen=True)
class RunParts:
    """What `run` has made before the first step."""

    context: RunContext
    report: FailureReport
    plan: ResumePlan
    engine: Engine
    """At the step at which the run starts."""
    data: BlendedDataset
    identity: dict[str, object]
    """What a checkpoint says of the run (`fgpt.checkpoint.identity`)."""
    suites: Sequence[QuestionFile]
    stop: StopSignals
    make_batches: Callable[..., MicroBatches]
    """See `Observer`."""

    def should_stop(self) -> bool:
        """Whether the run stops now, asked within an action; equal on every rank."""
        self.report.progress.tick()
        return self.stop()

    def perform(self, *actions: Action) -> None:
        """Run actions outside of the training loop, each in its phase."""
        for action in actions:
            with self.report.progress.during(action.phase):
                action.run()


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
    with ExitStack() as until_end, ExitStack() as watch, report.reporting():
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
        until_end.callback(stop.restore)
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
        with _closing(engine, report, stop):
            if plan.resume_point is not None:
                plan.checkpoints.load(engine, plan.resume_point, plan.states)
                observer.on_load(engine, plan.resume_point)
            elif plan.weights is not None:
                plan.weights.load(engine, context)
            parts = RunParts(
                context, report, plan, engine, data, identity, suites, stop, observer.make_batches
            )
            saved_step = _train(parts)
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

    def tell_of_death(rank: int) -> None:
        watchdog.tell_of_death(rank)

    kill_stopped = until.enter_context(watch_peers(world, device, report.leave, tell_of_death))
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
    report.tell, report.verdict = watchdog.tell, watchdog.verdict


@contextmanager
def _closing(engine: Engine, report: FailureReport, stop: StopSignals) -> Iterator[None]:
    """Close the engine at the end; after an error of one rank this would wait for the others."""
    try:
        with report.reporting():
            yield
    except Exception as error:
        if report.is_agreed(error):
            _close(engine, reason_of(error).exit_code, report)
        raise
    _close(engine, stop.exit_code, report)


def _close(engine: Engine, exit_code: int, report: FailureReport) -> None:
    """Close the engine; nobody watches any more, and NCCL may wait there for a rank that died."""
    with exit_after(CLOSE_S, exit_code) if report.exits else nullcontext():
        engine.close()


def _train(parts: RunParts) -> int | None:
    """Train up to the last step or a signal; returns the step of the last checkpoint."""
    context, report, plan = parts.context, parts.report, parts.plan
    engine, stop, options = parts.engine, parts.stop, parts.context.resolved.run
    with ExitStack() as closing, report.reporting():
        # 1. batches, and the run directory with its records
        batches, valid = _open_batches(parts, closing)
        claim_run_dir(context, plan, parts.data.tokenizer)
        report.run_dir = context.path
        report.samples = lambda step: batches.sample_ids(step).ravel().tolist()
        metrics = _open_metrics(parts, closing)
        # 2. what happens beside the steps
        evaluation = Evaluation(engine, valid, options.eval, metrics, parts.should_stop)
        saver = Saver(
            engine,
            options.checkpoint.every,
            plan.checkpoints,
            _make_save_info(parts, evaluation, batches, metrics),
            last_step=options.train.steps,
            background=_saves_in_background(context),
            report=context.print,
        )
        decoding = _decoding(parts, metrics)
        # 3. before the first step
        if engine.step == 0:
            parts.perform(evaluation, *decoding)
        else:
            # what a signal has kept them from; later evaluations are at other steps
            is_due = engine.step >= options.train.steps or _is_due(evaluation, engine.step)
            if plan.is_evaluated or not is_due:
                evaluation.evaluated_step = engine.step
            parts.perform(*(a for a in (evaluation, *decoding) if _is_due(a, engine.step)))
        if plan.is_saved_here:
            saver.begun_step = saver.saved_step = engine.step
        elif engine.step > 0:
            with report.progress.during(SAVING):
                saver.save_unless_saved()  # a restart with --resume auto must find it
        if engine.step >= options.train.steps:
            context.print(f"already at step {engine.step} of {options.train.steps}: raise --steps")
        # 4. the steps; checkpoints before decoding, which may take longer than a signal allows
        actions: list[Action] = [evaluation, saver, *decoding]
        if options.checkpoint.best:
            lowest = run_on_rank0(plan.checkpoints.directory.lowest_valid_loss, context.device)
            actions.insert(1, BestSaver(evaluation, saver, lowest))
        train(
            engine,
            batches,
            _hooks(parts, batches, metrics, saver),
            actions,
            last_step=options.train.steps,
            should_stop=stop,
            after_step=saver.commit_if_written,
            rank=context.world.rank,
            progress=report.progress,
        )
        # 5. after the last one
        if not stop.stopping:
            parts.perform(evaluation)
        with report.progress.during(SAVING):
            saver.save_unless_saved()
        if not stop.stopping:
            parts.perform(*decoding)
    if stop.stopping:
        context.print(f"stopped by a signal after step {engine.step}; continue with --resume auto")
    return saver.saved_step


def _open_batches(parts: RunParts, closing: ExitStack) -> tuple[MicroBatches, MicroBatches]:
    """The micro-batches of the training and of the validation split."""
    context, data = parts.context, parts.data
    training = make_micro_batches(
        context,
        data,
        "train",
        seed=context.resolved.run.data.seed,
        ramp=context.resolved.ramp,
        origin=parts.plan.origin,
        make=partial(parts.make_batches, skipped=skipped_samples(context)),
    )
    batches = closing.enter_context(training)
    # seed 0: a fixed sample of the whole split, not its first documents
    return batches, closing.enter_context(make_micro_batches(context, data, "valid", seed=0))


def _open_metrics(parts: RunParts, closing: ExitStack) -> Metrics | None:
    """The monitors, and rank 0's record of the run; None on the other ranks."""
    context, plan, engine = parts.context, parts.plan, parts.engine
    warn = partial(context.print, style="bold red")
    settings, path = context.resolved.settings, context.path
    run_on_rank0(lambda: engine.open_monitors(settings, path, warn), context.device)
    if plan.run_dir is None:
        return None
    file = plan.run_dir.path / METRICS
    metrics = Metrics(
        context.resolved, engine, file, context.console, context.device, plan.tokens_before
    )
    closing.callback(metrics.close)
    parts.report.flush = metrics.flush
    return metrics


def _hooks(
    parts: RunParts, batches: MicroBatches, metrics: Metrics | None, saver: Saver
) -> list[Hook]:
    """What is called with each step: the record, and the guards."""
    options, run_dir = parts.context.resolved.run.train, parts.plan.run_dir
    dump_dir = None if run_dir is None else run_dir.path
    hooks: list[Hook] = [] if metrics is None else [metrics]
    hooks.append(NonFiniteGuard(batches, options.max_skipped, dump_dir, saver.newest))
    if options.max_loss_jump:
        from fgpt.train.loss_jump import make_loss_jump_guard  # rarely needed

        hooks.append(make_loss_jump_guard(parts.context, batches, saver.newest))
    return hooks


def _read_suites(context: RunContext) -> list[QuestionFile]:
    """The files of `eval.suites`. Raises DataError."""
    if not context.resolved.run.eval.suites:
        return []
    from fgpt.train.decoding import read_suites  # rarely needed

    return read_suites(context)


def _decoding(parts: RunParts, metrics: Metrics | None) -> list[Action]:
    """The actions that decode with the model, where the configuration has them."""
    context, engine, data = parts.context, parts.engine, parts.data
    options = context.resolved.run.sample
    writes_samples = options.every > 0 and options.tokens > 0
    if not parts.suites and not writes_samples:
        return []
    from fgpt.train.decoding import SampleWriter, SuiteEvaluation  # rarely needed

    actions: list[Action] = []
    if parts.suites:
        actions.append(
            SuiteEvaluation(
                context, engine, data.tokenizer, parts.suites, metrics, parts.should_stop
            )
        )
    if writes_samples:

        def is_asked_to_stop() -> bool:  # rank 0 alone decodes
            parts.report.progress.tick()
            return parts.stop.received > 0

        actions.append(SampleWriter(context, engine, data, is_asked_to_stop))
    return actions


def _is_due(action: Action, step: int) -> bool:
    return action.every > 0 and step % action.every == 0


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
    parts: RunParts, evaluation: Evaluation, batches: MicroBatches, metrics: Metrics | None
) -> Callable[[], SaveInfo]:
    """Return the function that describes a checkpoint of the current step, before it is written.

    It raises TrainingError if the weights are not finite.
    """
    engine, plan, resolved = parts.engine, parts.plan, parts.context.resolved

    def info() -> SaveInfo:
        if any_rank(not weights_are_finite(engine.model), parts.context.device):
            raise TrainingError(f"step {engine.step}: the weights are not finite")
        if metrics is not None:
            metrics.flush()
        return SaveInfo(
            samples_seen=batches.samples_seen(engine.step),
            tokens_seen=plan.tokens_before + batches.samples_read(engine.step) * resolved.seq_len,
            identity=parts.identity,
            config=resolved.to_json(),
            optimizer=str(resolved.deepspeed["optimizer"]["type"]),
            history=plan.history,
            valid_loss=evaluation.current_loss,
        )

    return info
