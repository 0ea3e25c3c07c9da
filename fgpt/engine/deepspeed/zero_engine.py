"""DeepSpeed's ordinary engine (ZeRO 0-3, offload, fp32, bf16, fp16) behind FGPT's protocol."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor, nn

from fgpt.data.loader import MicroBatch
from fgpt.distributed.agreements import mean_over_ranks
from fgpt.distributed.launch import World, lost_rank
from fgpt.engine.base import PendingStep, SavedFile, batch_context
from fgpt.engine.deepspeed.checkpoint_files import Files
from fgpt.engine.deepspeed.optimizer_step import OptimizerStep, overflow_explained
from fgpt.errors import CheckpointError
from fgpt.model.context import BatchContext, ForwardContext
from fgpt.optim.build import settings_kept
from fgpt.parallel.gather import gather_full_tensors, max_copy_differences
from fgpt.parallel.topology import ProcessGroups


@dataclass(frozen=True)
class EngineDependencies:
    """What an engine is given beside DeepSpeed's."""

    world: World
    groups: ProcessGroups
    made: Sequence[dist.ProcessGroup]
    """Process groups that end with the engine."""
    shapes: Mapping[str, torch.Size]
    """Of the whole model's parameters, by logical name."""
    seed: int
    """Of dropout."""
    clip: float | None
    """Set where FGPT clips because DeepSpeed would not report the norm nor notice a NaN: fp32
    without ZeRO. DeepSpeed's own clipping is off in that case."""


class ZeroEngine:
    """One DeepSpeed engine; the ranks with the same weights are data parallel."""

    def __init__(self, deepspeed: DeepSpeedEngine, setup: EngineDependencies):
        self.deepspeed = deepspeed
        self.model: nn.Module = deepspeed.module
        self.context: ForwardContext = deepspeed.module.context
        self.setup = setup
        self.world, self.groups = setup.world, setup.groups
        self.optimizer_step = OptimizerStep(deepspeed, setup.groups, setup.clip)
        self.files = Files()
        deepspeed.checkpoint_engine = self.files
        # executable copies of conversion scripts; FGPT runs no code out of a run directory, and a
        # full disk would end rank 0 in there, alone
        deepspeed._copy_recovery_script = lambda save_path: None

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.deepspeed.global_steps

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far; waits for the latest step."""
        self.optimizer_step.sync()
        return self.deepspeed.skipped_steps

    def train_batch(self, micro_batches: Sequence[MicroBatch]) -> PendingStep:
        """See `Engine.train_batch`."""
        engine = self.deepspeed
        engine.train()
        total = torch.zeros((), device=engine.device)
        for number, batch in enumerate(micro_batches):
            with self.context.activate(self._batch_context(number, batch)):
                loss = engine(self._own(batch.inputs), self._own(batch.targets))
            total += loss.detach().float() / len(micro_batches)
            engine.backward(loss)
            with overflow_explained(engine):
                engine.step()
        return self.optimizer_step.pending(mean_over_ranks(total))

    def _batch_context(self, number: int, batch: MicroBatch) -> BatchContext:
        """What the step's micro-batch `number` is, to the model."""
        grid, coordinates = self.groups.grid, self.groups.coordinates
        first = (number * grid.dp + coordinates.data) * len(batch.inputs)
        return batch_context(batch, self.deepspeed.device, self.setup.seed, self.step, first)

    def _own(self, ids: Tensor) -> Tensor:
        """[B, T] -> this context-parallel rank's tokens [B, T / cp], on the device."""
        part = ids.chunk(self.groups.grid.cp, dim=1)[self.groups.coordinates.context]
        return part.to(self.deepspeed.device, non_blocking=True)

    @torch.no_grad()
    def eval_batches(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """See `Engine.eval_batches`."""
        self.deepspeed.eval()
        losses = []
        for number, batch in enumerate(micro_batches):
            with self.context.activate(self._batch_context(number, batch)):
                loss = self.deepspeed(self._own(batch.inputs), self._own(batch.targets))
            losses.append(loss.float())
        return torch.stack(losses).mean()

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by logical name."""
        return dict(self.model.named_parameters())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.weights`."""
        held = {name: partial(_unsharded, p) for name, p in self.parameters().items()}
        like = next(self.model.parameters())
        return gather_full_tensors(held, self.setup.shapes, self.groups, like)

    def first_moments(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.first_moments`."""
        like = torch.empty(0, device=self.deepspeed.device)
        return gather_full_tensors(self._first_moments(), self.setup.shapes, self.groups, like)

    def max_copy_differences(self) -> dict[str, float]:
        """Logical name -> largest difference of the first moment between tensor ranks that each
        hold all of it; of this rank's stage, and equal on its tensor ranks.
        """
        return max_copy_differences(self._first_moments(), self.groups)

    def _first_moments(self) -> dict[str, Callable[[], Tensor]]:
        optimizer = self.deepspeed.optimizer
        if hasattr(optimizer, "_hp_optimizer_states_linked"):
            # done after the first group's first step, when the second group has no state yet
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        return {name: partial(self._first_moment, p) for name, p in self.parameters().items()}

    def _first_moment(self, parameter: nn.Parameter) -> Tensor:
        sharded = safe_get_full_optimizer_state(parameter, "exp_avg")
        if sharded is not None:
            return sharded.to(self.deepspeed.device)
        moment: Tensor = self.deepspeed.optimizer.state[parameter]["exp_avg"]
        return moment

    def save(self, directory: Path) -> list[SavedFile]:
        """See `Engine.save`."""
        self.optimizer_step.sync()  # DeepSpeed's counters are in its files
        self.files.begin()
        self.deepspeed.save_checkpoint(
            str(directory.parent), tag=directory.name, client_state={}, save_latest=False
        )
        return self.files.finish()

    def load(self, directory: Path) -> None:
        """See `Engine.load`."""
        engine = self.deepspeed
        try:
            with settings_kept(engine.optimizer), contextlib.redirect_stdout(io.StringIO()):
                path, _ = engine.load_checkpoint(str(directory.parent), tag=directory.name)
        except (RuntimeError, KeyError, ValueError, AssertionError) as error:
            if isinstance(error, RuntimeError) and lost_rank(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{directory}: DeepSpeed cannot load it: {reason}") from error
        if path is None:  # DeepSpeed only warns
            raise CheckpointError(f"{directory}: DeepSpeed found no checkpoint there")
        self._restore_json()
        schedule = engine.lr_scheduler
        if schedule is not None and schedule.last_batch_iteration >= 0:
            schedule.step(schedule.last_batch_iteration)  # the next step's rate

    def _restore_json(self) -> None:
        """Undo what loading took from the checkpoint though the JSON says it."""
        engine, optimizer = self.deepspeed, self.deepspeed.optimizer
        if hasattr(optimizer, "clip_grad"):
            optimizer.clip_grad = engine.gradient_clipping()

    def log_scalars(self, scalars: dict[str, float], samples: int) -> None:
        """See `Engine.log_scalars`."""
        monitor = self.deepspeed.monitor
        if monitor.enabled and self.world.is_rank0:
            monitor.write_events([(name, value, samples) for name, value in scalars.items()])

    def close(self) -> None:
        """See `Engine.close`."""
        self.deepspeed.destroy()
        deepspeed_groups.mpu = None  # it would be the next engine's too
        for group in self.setup.made:
            if group is not deepspeed_groups._WORLD_GROUP:  # that is kept for the next engine
                dist.destroy_process_group(group)


def _unsharded(parameter: nn.Parameter) -> Tensor:
    """A parameter's values, also where ZeRO-3 has sharded it."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with GatheredParameters([parameter]):
        return parameter.detach().clone()
