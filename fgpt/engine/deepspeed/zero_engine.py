"""DeepSpeed's ordinary engine (ZeRO 0-3, offload, fp32, bf16, fp16) behind the engine protocol."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from fgpt.config.deepspeed.settings import DeepSpeedSettings
from fgpt.data.loader import MicroBatch
from fgpt.distributed.agreements import mean_over_ranks
from fgpt.distributed.launch import World
from fgpt.engine.base import PendingStep, batch_context
from fgpt.engine.deepspeed import patches
from fgpt.engine.deepspeed.monitors import Monitors
from fgpt.engine.deepspeed.optimizer_step import OptimizerStep, loss_scale_errors
from fgpt.engine.deepspeed.state import DeepSpeedState
from fgpt.engine.state import EMA, Progress, StateTensor
from fgpt.model.context import BatchContext, ForwardContext
from fgpt.parallel.gather import gather_full_tensors, max_copy_differences
from fgpt.parallel.tensor.parallelize import without_sequence_parallelism
from fgpt.parallel.topology import ProcessGroups

if TYPE_CHECKING:
    from fgpt.engine.moving_average import MovingAverage


@dataclass(frozen=True)
class EngineDependencies:
    """What a `ZeroEngine` needs beside DeepSpeed's engine."""

    world: World
    groups: ProcessGroups
    created_groups: Sequence[dist.ProcessGroup]
    """Process groups to destroy with the engine, DeepSpeed's included."""
    full_shapes: Mapping[str, torch.Size]
    """Logical name -> shape of the unsharded parameter."""
    seed: int
    """Seed of dropout."""
    clip: float | None
    """Clipping limit in fp32 without ZeRO, where DeepSpeed's clipping is off: it neither reports
    the norm nor notices a NaN. None elsewhere."""
    state_names: Sequence[str]
    """The states of a parameter in the JSON's optimizer."""
    nvme_dirs: tuple[Path, ...] = ()
    """This run's directories of weights and states on NVMe, removed with the engine."""
    ema: float | None = None
    """Decay of a moving average of the weights; None: no average."""


class ZeroEngine:
    """An `Engine` on the ranks of a grid without pipeline stages."""

    def __init__(self, deepspeed: DeepSpeedEngine, dependencies: EngineDependencies):
        self.deepspeed = deepspeed
        self.model: nn.Module = deepspeed.module
        self.context: ForwardContext = deepspeed.module.context
        self.dependencies = dependencies
        self.world = dependencies.world
        self.groups: ProcessGroups = dependencies.groups
        self.on_gradients: Callable[[], None] | None = None
        self.optimizer_step = OptimizerStep(
            deepspeed, self.groups, dependencies.clip, self._notify_gradients, self._step_applied
        )
        self.average: MovingAverage | None = None
        if dependencies.ema is not None:
            from fgpt.engine.moving_average import MovingAverage

            masters = patches.master_tensors(deepspeed.optimizer)
            self.average = MovingAverage([m.weights for m in masters], dependencies.ema)
        self.monitors: Monitors | None = None
        patches.link_round_robin_parameters(deepspeed.optimizer)
        if deepspeed.flops_profiler_enabled():
            from fgpt.engine.deepspeed.flops_profiler import StepFlopsProfiler  # rarely needed

            deepspeed.flops_profiler = StepFlopsProfiler(deepspeed, self._samples_per_rank())

    @property
    def step(self) -> int:
        return self.deepspeed.global_steps

    @property
    def skipped_steps(self) -> int:
        """See `Engine.skipped_steps`; waits for the latest step."""
        self.optimizer_step.sync()
        return self.deepspeed.skipped_steps

    def train_batch(self, micro_batches: Sequence[MicroBatch]) -> PendingStep:
        engine = self.deepspeed
        engine.train()
        self._fit_accumulation(len(micro_batches))
        total = torch.zeros((), device=engine.device)
        for number, batch in enumerate(micro_batches):
            with self.context.activate(self._batch_context(number, batch)):
                loss = engine(self._local_tokens(batch.inputs), self._local_tokens(batch.targets))
            total += loss.detach().float() / len(micro_batches)
            engine.backward(loss)
            with loss_scale_errors(engine):
                engine.step()  # ends in OptimizerStep, and for ZeRO-1/2 in SyncFreeZeroStep
        return self.optimizer_step.pending(mean_over_ranks(total))

    def _fit_accumulation(self, number: int) -> None:
        """Have DeepSpeed step after `number` micro-batches, which a batch ramp changes."""
        engine = self.deepspeed
        before = engine.gradient_accumulation_steps()
        if number == before:
            return
        engine.set_train_batch_size(engine.train_batch_size() // before * number)
        engine.micro_steps = 0  # it steps when this has counted so many
        engine.tput_timer.batch_size = engine.train_batch_size()
        if engine.flops_profiler_enabled():
            engine.flops_profiler.samples_per_rank = self._samples_per_rank()

    def _samples_per_rank(self) -> float:
        """The global batch divided by the number of ranks."""
        # DeepSpeed counts each context-parallel rank's part of a sample as a sample
        return self.deepspeed.train_batch_size() / self.groups.grid.cp / self.world.size

    def _batch_context(self, number: int, batch: MicroBatch) -> BatchContext:
        """Return the context of micro-batch `number` of the current step."""
        grid, coordinates = self.groups.grid, self.groups.coordinates
        first = (number * grid.dp + coordinates.data) * len(batch.inputs)
        return batch_context(batch, self.deepspeed.device, self.dependencies.seed, self.step, first)

    def _local_tokens(self, ids: Tensor) -> Tensor:
        """[B, T] -> this context-parallel rank's tokens [B, T / cp], on the device."""
        part = ids.chunk(self.groups.grid.cp, dim=1)[self.groups.coordinates.context]
        return part.to(self.deepspeed.device, non_blocking=True)

    @torch.no_grad()
    def eval_batches(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        self.deepspeed.eval()
        losses = []
        for number, batch in enumerate(micro_batches):
            with self.context.activate(self._batch_context(number, batch)):
                inputs, targets = map(self._local_tokens, (batch.inputs, batch.targets))
                losses.append(self.deepspeed(inputs, targets).float())
        for name in self.deepspeed.engine_timers.forward_timers:  # or the next step counts these
            self.deepspeed.timers(name).reset()
        return torch.stack(losses).mean()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        assert self.average is not None
        self.optimizer_step.sync()
        with self.average.in_place():
            self._update_weights()
            yield
        self._update_weights()

    def _update_weights(self) -> None:
        """Set the weights of the forward pass to the masters. Collective."""
        patches.prepare_for_new_weights(self.deepspeed.optimizer)
        patches.update_weights(self.deepspeed.optimizer)

    def _step_applied(self) -> None:
        """Called after each step that was not skipped, once that is known."""
        if self.average is not None:
            self.average.update(self.deepspeed.global_steps - self.deepspeed.skipped_steps)

    @contextmanager
    def decoding_layers(self) -> Iterator[Mapping[str, nn.Module]]:
        self.deepspeed.eval()
        layers = self._layers()
        with (
            patches.all_sharded(self.deepspeed.optimizer),
            without_sequence_parallelism(layers.values()),
        ):
            yield layers

    def _layers(self) -> Mapping[str, nn.Module]:
        layers: Mapping[str, nn.Module] = self.deepspeed.module.layers()
        return layers

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return this rank's parameters by logical name."""
        return dict(self.model.named_parameters())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        like, readers = next(self.model.parameters()), self._readers(patches.full_weight)
        with patches.all_sharded(self.deepspeed.optimizer):
            yield from gather_full_tensors(
                readers, self.dependencies.full_shapes, self.groups, like
            )

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        like = torch.empty(0, device=self.deepspeed.device)
        return gather_full_tensors(
            self._readers(patches.full_gradient), self.dependencies.full_shapes, self.groups, like
        )

    def copy_differences(self, *, gradients: bool) -> dict[str, float]:
        """Return logical name -> largest difference of a weight between its tensor ranks.

        For the parameters of this stage that every tensor rank holds. `gradients`: of their
        gradients, valid only inside `on_gradients`.
        """
        if gradients:
            return max_copy_differences(self._readers(patches.full_gradient), self.groups)
        with patches.all_sharded(self.deepspeed.optimizer):
            return max_copy_differences(self._readers(patches.full_weight), self.groups)

    def _readers(self, read: Callable[[nn.Parameter], Tensor]) -> dict[str, Callable[[], Tensor]]:
        return {name: partial(read, p) for name, p in self.parameters().items()}

    def _notify_gradients(self) -> None:
        if self.on_gradients is not None:
            self.on_gradients()

    def _state(self) -> DeepSpeedState:
        return DeepSpeedState(
            self.deepspeed.optimizer,
            self.parameters(),
            self.dependencies.full_shapes,
            self.groups,
            self.state_names,
            self._saved_elsewhere(),
            self.average.tensors if self.average is not None else None,
        )

    def _saved_elsewhere(self) -> Collection[str]:
        """Parameters of this rank that another pipeline stage saves."""
        return ()

    @property
    def state_names(self) -> Sequence[str]:
        return self.dependencies.state_names

    def progress(self) -> Progress:
        self.optimizer_step.sync()
        return self._state().progress(self.step, self.deepspeed.skipped_steps)

    def saving(self) -> AbstractContextManager[Sequence[StateTensor]]:
        self.optimizer_step.sync()
        return self._state().reading()

    @contextmanager
    def restoring(self, progress: Progress, states: Sequence[str]) -> Iterator[list[StateTensor]]:
        engine, state = self.deepspeed, self._state()
        with state.filling(states, progress.updates) as tensors:
            yield tensors
        if self.average is not None and EMA not in states:
            self.average.restart()
        state.restore_loss_scale(progress)
        engine.global_steps, engine.skipped_steps = progress.step, progress.skipped_steps
        engine.global_samples = progress.step * engine.train_batch_size()
        # the state of a schedule is the number of steps it was asked for
        applied = progress.step - progress.skipped_steps
        if engine.lr_scheduler is not None and applied > 0:
            engine.lr_scheduler.step(applied - 1)  # sets the next step's rate

    def open_monitors(
        self, settings: DeepSpeedSettings, run_dir: Path, warn: Callable[[str], None]
    ) -> None:
        sections = settings.monitors
        if sections and self.world.is_rank0:
            self.monitors = Monitors(sections, run_dir, lambda: self.step, warn)
            self.deepspeed.monitor = self.monitors

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        if self.monitors is not None:
            self.monitors.log(scalars, step)

    def close(self) -> None:
        if self.monitors is not None:
            self.monitors.close()
        self.deepspeed.destroy()
        if self.world.local_rank == 0 and self.dependencies.nvme_dirs:
            from fgpt.engine.deepspeed.nvme import remove_nvme  # rarely needed

            remove_nvme(self.dependencies.nvme_dirs)
        patches.destroy_process_groups(self.dependencies.created_groups)
