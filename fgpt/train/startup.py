"""Before the first step: what every part of a run knows, the data, what is said of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from fgpt.config.batch import BatchRamp
from fgpt.config.field_syntax import parse_blend, parse_ranges, parse_stages
from fgpt.config.resolve import Resolved
from fgpt.config.schema import DataConfig
from fgpt.config.speed import slow_paths
from fgpt.data.card import CARD_NAME
from fgpt.data.loader import MicroBatches
from fgpt.data.token_dataset import BlendedDataset, open_blended_dataset
from fgpt.distributed.agreements import run_on_all, run_on_rank0_for_long
from fgpt.distributed.launch import PREPARE_TIMEOUT, World, default_store
from fgpt.errors import DataError, printable
from fgpt.model.count import n_params
from fgpt.parallel.topology import Grid
from fgpt.utils.keys import nearest

if TYPE_CHECKING:
    from fgpt.data.skip import SkippedSamples


@dataclass(frozen=True)
class RunContext:
    """What a run knows before it has data or an engine."""

    resolved: Resolved
    """The configuration."""
    world: World
    """This rank's position."""
    device: torch.device
    """This rank's device."""
    console: Console
    """Prints on rank 0 only."""

    def print(self, text: str, style: str | None = None) -> None:
        """Print one line literally: rich would read markup in a path, and a path may have lines."""
        self.console.print(printable(text), style=style, highlight=False, markup=False)

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(str(self.resolved.run.run_dir))


def open_data(context: RunContext) -> BlendedDataset:
    """Open the data sets on every rank; rank 0 prepares a single missing one first."""
    data, device = context.resolved.run.data, context.device

    def prepare_if_missing() -> None:
        parts = parse_blend(data.path)
        missing = [Path(p.path) for p in parts if not (Path(p.path) / CARD_NAME).exists()]
        for stage in [] if data.stages is None else parse_stages(data.stages):
            for later in map(Path, (part.path for part in parse_blend(stage.path))):
                if not (later / CARD_NAME).exists():
                    hint = (
                        _intended_data(later) or f"no data set there: {_remedy(later, recipe='')}"
                    )
                    raise DataError(f"data.stages {later}: {hint}")
        for path in missing:
            if hint := _intended_data(path):
                raise DataError(f"data.path {path}: {hint}")
        if missing and len(parts) == 1:
            origins = context.resolved.origins
            how = [origins.get(f"run.data.{name}", "default") for name in ("path", "recipe")]
            is_default = how[0] == "default" or data.path == DataConfig().path
            if not is_default and how[1] == "default":
                raise DataError(f"data.path {missing[0]}: no data set there: {_remedy(missing[0])}")
            if not Path(data.recipe).exists():
                raise DataError(
                    f"data.path {missing[0]}: no data set there, and data.recipe {data.recipe}, by"
                    " which FGPT would make it, does not exist: name a data set or a recipe"
                )
            from fgpt.prepare.pipeline import ensure_prepared  # large, and rarely needed

            ensure_prepared(parts[0].path, data.recipe)

    run_on_rank0_for_long(prepare_if_missing, device, default_store(), PREPARE_TIMEOUT)
    return run_on_all(lambda: open_prepared_data(context.resolved), device)


def open_prepared_data(resolved: Resolved) -> BlendedDataset:
    """Open the data sets, which exist, and check that they fit the run. Raises DataError."""
    data = resolved.run.data
    if data.stages is None:
        dataset = open_blended_dataset(data.path)
    else:
        from fgpt.data.stages import open_staged_dataset  # rarely needed

        dataset = open_staged_dataset(data.path, data.stages)
    dataset.check_fits(resolved.run.model.vocab_size)
    try:
        dataset.tokenizer.encode(resolved.run.sample.prompt)
    except DataError as error:
        raise DataError(f"sample.prompt: {error}; write it in UTF-8") from error
    return dataset


def skipped_samples(context: RunContext) -> SkippedSamples | None:
    """The samples of `data.skip_samples`; None: all are read."""
    text = context.resolved.run.data.skip_samples
    if text is None:
        return None
    from fgpt.data.skip import SkippedSamples  # rarely needed

    return SkippedSamples(parse_ranges(text))


def make_micro_batches(
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


def _remedy(path: Path, recipe: str = ", or name its recipe (--set data.recipe=FILE)") -> str:
    """How to come by a data set where the user named `path`, which is none."""
    inside = sorted(card.parent.name for card in path.glob(f"*/{CARD_NAME}"))
    if inside:
        return f"name one of those in it: {', '.join(inside)}"
    if path.exists():
        name = path.name.partition(".")[0] or "mine"
        return f"if it is text: fgpt prepare --input {path} --out data/prepared/{name}"
    return f"make it with fgpt prepare --input TEXTS --out {path}{recipe}"


def _intended_data(path: Path) -> str:
    """Return what a path without a data card probably means, with the remedy, or nothing."""
    folder = path.parent
    shard = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if (folder / CARD_NAME).exists() and (path.is_file() or _is_prefix(shard)):
        return f"is a file of the data set {folder}: name the directory, --data {folder}"
    if _is_prefix(shard):
        return (
            "is a Megatron prefix: make a data set of it with fgpt data import --train"
            f" {shard} --tokenizer TOKENIZER --out DIR"
        )
    if path.exists() or not folder.is_dir():
        return ""
    known = [other.parent.name for other in folder.glob(f"*/{CARD_NAME}")]
    guess = nearest(path.name, known)
    return f"does not exist; did you mean {folder / guess}?" if guess else ""


def _is_prefix(path: Path) -> bool:
    """Whether path.bin and path.idx exist."""
    return all(path.with_name(path.name + end).is_file() for end in (".bin", ".idx"))


def print_header(context: RunContext, data: BlendedDataset) -> None:
    """Print model, engine, data, batch sizes, what became of the JSON, slow paths, stages."""
    resolved, model = context.resolved, context.resolved.run.model
    context.print(
        f"{model.preset}: {n_params(model):,} parameters, {describe_engine(resolved)},"
        f" {context.world.size} rank(s) on {context.device.type}"
    )
    n_samples = resolved.ramp.samples_before(resolved.run.train.steps)
    for line in data.usage(resolved.seq_len, n_samples):
        context.print(line)
    context.print(resolved.batch.explain())
    if resolved.run.train.batch_ramp is not None:
        context.print(f"global batch: {resolved.ramp.explain()}")
    if (skipped := resolved.run.data.skip_samples) is not None:
        context.print(f"left out: samples {skipped}")
    for issue in resolved.issues:
        context.print(f"{issue.grade}: {issue}")
    for line in slow_paths(resolved):
        context.print(f"slow path: {line}")
    if resolved.batch.pp > 1:
        from fgpt.plan.memory import render_stages, stage_table

        render_stages(stage_table(resolved), context.console)


def describe_engine(resolved: Resolved) -> str:
    """Return engine, precision and grid in words."""
    if resolved.run.train.engine == "plain":
        return f"plain engine, {resolved.precision}"
    batch = resolved.batch
    sizes = {"tp": batch.tp, "pp": batch.pp, "cp": batch.cp}
    grid = "".join(f", {axis} {size}" for axis, size in sizes.items() if size > 1)
    sequence = " with sequence parallelism" if resolved.run.parallel.sequence else ""
    precision = resolved.settings.precision_text
    return f"DeepSpeed ZeRO-{resolved.zero_stage}, {precision}{grid}{sequence}"
