"""The reference engine ("oracle"): one process, torch only. Parity compares all others with it.

Mixed precision as in DeepSpeed: the model computes with rounded copies of float32 master weights,
gradients are accumulated and clipped in float32, and the optimizer updates the masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fgpt.config.deepspeed.settings import DeepSpeedSettings
from fgpt.config.schema import ScheduleConfig
from fgpt.data.loader import MicroBatch
from fgpt.engine.base import AsyncScalars, PendingStep, batch_context
from fgpt.engine.state import (
    EMA,
    WEIGHT,
    Fragment,
    Progress,
    Shard,
    StateTensor,
    Values,
    state_to_fill,
    state_to_read,
)
from fgpt.model.gpt import GPT
from fgpt.optim.build import (
    LearningRateFactors,
    make_optimizer,
    matrix_group,
    muon_update,
    parameter_groups,
)
from fgpt.optim.optimizers import OPTIMIZERS, peak_rate
from fgpt.optim.schedules import learning_rate
from fgpt.optim.states import create_states, read_updates, set_updates
from fgpt.parallel.grad_norm import sum_of_squares
from fgpt.parallel.topology import ProcessGroups

if TYPE_CHECKING:
    from fgpt.engine.moving_average import MovingAverage
    from fgpt.optim.muon import MatrixUpdate
    from fgpt.optim.run_schedule import RunSchedule


class PlainEngine:
    """An `Engine` with the DeepSpeed JSON's Adam(W), schedule and clipping, without DeepSpeed.

    The run file's schedule replaces the JSON's.
    """

    def __init__(
        self,
        model: GPT,
        deepspeed_json: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        schedule: ScheduleConfig,
        ema: float | None = None,
    ):
        """`ema`: decay of a moving average of the weights; None: no average."""
        self.model: nn.Module = model.to(device=device, dtype=dtype)
        self.layers = model.layers()
        self.groups: ProcessGroups | None = None
        self.context = model.context
        self.device = device
        self.seed = seed
        self.step = 0
        self.skipped_steps = 0
        self.on_gradients: Callable[[], None] | None = None
        self.clip: float = deepspeed_json.get("gradient_clipping", 0.0)
        self.scheduler = deepspeed_json.get("scheduler")
        section = deepspeed_json["optimizer"]
        self.base_lr = peak_rate(section.get("params", {}))
        # (parameter, float32 master); in fp32 they are the same tensor
        self.masters: list[tuple[nn.Parameter, Tensor]] = []
        table = OPTIMIZERS[section["type"].lower()]
        matrices = matrix_group(section, model.config)
        groups = parameter_groups(self.model.named_parameters(), matrices)
        for group in groups:
            group["params"] = [self._add_master(p) for p in group["params"]]
        self.optimizer = make_optimizer(section, groups)
        if table.is_own:
            on_cuda = device.type == "cuda"
            self._give_whole_matrices(muon_update(section, model.config, dtype, on_cuda=on_cuda))
        elif matrices is not None:
            LearningRateFactors(self.optimizer)
        self.run_schedule: RunSchedule | None = None
        if schedule.kind != "deepspeed":
            from fgpt.optim.run_schedule import RunSchedule

            self.run_schedule = RunSchedule(self.optimizer, schedule)
        self.state_names = table.state_names(section.get("params", {}))
        self.average: MovingAverage | None = None
        if ema is not None:
            from fgpt.engine.moving_average import MovingAverage

            self.average = MovingAverage([master for _, master in self.masters], ema)

    def _give_whole_matrices(self, update: MatrixUpdate) -> None:
        from fgpt.optim.muon import Muon, WholeMatrices  # most runs do not need it

        assert isinstance(self.optimizer, Muon)
        masters = dict(self.masters)
        names = {masters[p]: name for name, p in self.model.named_parameters()}
        self.optimizer.orthogonalize = WholeMatrices(names, update)

    def _add_master(self, parameter: nn.Parameter) -> Tensor:
        is_float32 = parameter.dtype == torch.float32
        master = parameter if is_float32 else parameter.detach().float().requires_grad_()
        self.masters.append((parameter, master))
        return master

    def train_batch(self, micro_batches: Sequence[MicroBatch]) -> PendingStep:
        self.model.train()
        # 1. accumulate the mean gradient of all micro-batches
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches):
            loss = self._loss(batch, first_sample=number * len(batch.inputs)) / len(micro_batches)
            loss.backward()
            self._accumulate_gradients()
            total += loss.detach().float()
        if self.on_gradients is not None:
            self.on_gradients()
        # 2. clip and apply it, unless it is not finite
        masters = [master for _, master in self.masters]
        gradients = [master.grad for master in masters if master.grad is not None]
        norm = sum_of_squares(gradients, self.device).sqrt().float()
        rate = self._set_rates()
        skipped = not bool(torch.isfinite(norm))
        if not skipped:
            if self.clip > 0:
                torch.nn.utils.clip_grads_with_norm_(masters, self.clip, norm)
            self._update_weights()
        self.optimizer.zero_grad()
        self.step += 1
        self.skipped_steps += skipped
        if self.average is not None and not skipped:
            self.average.update(self.step - self.skipped_steps)
        return PendingStep(AsyncScalars(total, norm, float(skipped)), rate)

    def _loss(self, batch: MicroBatch, first_sample: int = 0) -> Tensor:
        """Return the mean loss [] of a micro-batch; `first_sample`: its index."""
        with self.context.activate(
            batch_context(batch, self.device, self.seed, self.step, first_sample)
        ):
            inputs, targets = (
                ids.to(self.device, non_blocking=True) for ids in (batch.inputs, batch.targets)
            )
            loss: Tensor = self.model(inputs, targets)
        return loss

    def _accumulate_gradients(self) -> None:
        """Add the model's gradients to the masters' in float32."""
        for parameter, master in self.masters:
            if parameter is not master and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def _set_rates(self) -> float:
        """Set this step's learning rates; return that of the first parameter group."""
        applied_steps = self.step - self.skipped_steps
        if self.run_schedule is not None:
            self.run_schedule.step(applied_steps - 1)
        else:
            rate = learning_rate(self.scheduler, self.base_lr, applied_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        return float(self.optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def _update_weights(self) -> None:
        self.optimizer.step()
        self._round_masters()

    @torch.no_grad()
    def _round_masters(self) -> None:
        """Set the model's weights to the masters, where these are others."""
        rounded = [(p, m) for p, m in self.masters if p is not m]
        if rounded:
            parameters, masters = zip(*rounded, strict=True)
            torch._foreach_copy_(parameters, masters)

    @torch.no_grad()
    def eval_batches(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        self.model.eval()
        return torch.stack([self._loss(batch).float() for batch in micro_batches]).mean()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        assert self.average is not None
        with self.average.in_place():
            self._round_masters()
            yield
        self._round_masters()

    def decoding_layers(self) -> AbstractContextManager[Mapping[str, nn.Module]]:
        self.model.eval()
        return nullcontext(self.layers)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p.detach()) for name, p in self.model.named_parameters())

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        masters = dict(self.masters)
        for name, parameter in self.model.named_parameters():
            gradient = masters[parameter].grad
            assert gradient is not None, "only valid inside on_gradients"
            yield name, gradient

    def saving(self) -> AbstractContextManager[Sequence[StateTensor]]:
        names = [*self.state_names, *([EMA] if self.average is not None else [])]
        return nullcontext(self._state(names))

    def progress(self) -> Progress:
        updates = max(read_updates(self.optimizer, master) for _, master in self.masters)
        return Progress(self.step, self.skipped_steps, updates)

    @contextmanager
    def restoring(self, progress: Progress, states: Sequence[str]) -> Iterator[list[StateTensor]]:
        # 1. states, in the order of the optimizer's groups
        masters = [(i, m) for i, g in enumerate(self.optimizer.param_groups) for m in g["params"]]
        for group, master in masters if {*states} - {EMA} else ():
            create_states(self.optimizer, group, master)
            set_updates(self.optimizer, group, master, progress.updates)
        # 2. their values, and the rounded weights
        yield self._state(states, fill=True)
        self._round_masters()
        if self.average is not None and EMA not in states:
            self.average.restart()
        self.step, self.skipped_steps = progress.step, progress.skipped_steps

    def _state(self, states: Sequence[str], *, fill: bool = False) -> list[StateTensor]:
        """The master weights, and which of these states there are, to read or to fill."""
        masters = dict(self.masters)
        averages: dict[Tensor, Tensor] = {}
        if self.average is not None:
            averages = dict(zip(masters.values(), self.average.tensors, strict=True))
        tensors = []
        for name, parameter in self.model.named_parameters():
            master = masters[parameter]
            shape = tuple(master.shape)
            fragment = Fragment(Shard(name, shape, (0,) * len(shape), shape), 0, master.numel(), 0)
            own = {**self.optimizer.state.get(master, {}), WEIGHT: master.detach()}
            if master in averages:
                own[EMA] = averages[master]
            for state in (WEIGHT, *(s for s in states if s in own)):
                open_values = partial(self._open, own, state, fill)
                tensors.append(StateTensor(state, own[state].dtype, [fragment], open_values))
        return tensors

    def _open(
        self, states: Mapping[str, Any], state: str, fill: bool
    ) -> AbstractContextManager[Values]:
        return state_to_fill(states, state) if fill else nullcontext(state_to_read(states, state))

    def open_monitors(
        self, settings: DeepSpeedSettings, run_dir: Path, warn: Callable[[str], None]
    ) -> None:
        """Do nothing: the monitors belong to DeepSpeed."""

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
