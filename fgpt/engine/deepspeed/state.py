"""The training state of a DeepSpeed engine by logical names (see `fgpt.engine.state`)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgpt.engine.deepspeed import patches
from fgpt.engine.deepspeed.patches import MasterTensor
from fgpt.engine.state import (
    EMA,
    WEIGHT,
    Fragment,
    Progress,
    Shard,
    StateTensor,
    Values,
    assign_writers,
    state_to_fill,
    state_to_read,
)
from fgpt.optim.states import create_states, read_updates, set_updates, states_of
from fgpt.parallel.tensor.sharding import shard_box, shard_dim
from fgpt.parallel.topology import ProcessGroups

LOSS_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The state of DeepSpeed's dynamic loss scalers."""


def make_shards(
    names: Collection[str], shapes: Mapping[str, torch.Size], groups: ProcessGroups
) -> dict[str, Shard]:
    """Return this rank's shard of each of these parameters."""
    rank, tp = groups.coordinates.tensor, groups.grid.tp
    return {
        name: Shard(name, tuple(shapes[name]), *shard_box(name, shapes[name], rank, tp))
        for name in names
    }


class DeepSpeedState:
    """The state tensors of one rank, to read or to fill."""

    def __init__(
        self,
        optimizer: Any,
        parameters: Mapping[str, nn.Parameter],
        shapes: Mapping[str, torch.Size],
        groups: ProcessGroups,
        state_names: Sequence[str],
        saved_elsewhere: Collection[str] = (),
        average: Sequence[Tensor] | None = None,
    ):
        """`optimizer`: DeepSpeed's. `parameters`: this rank's, by logical name. `shapes`: of the
        full ones. `state_names`: those that the optimizer may have. `saved_elsewhere`: parameters
        that another pipeline stage saves. `average`: that of each master tensor, if there is one.
        """
        self.optimizer, self.state_names = optimizer, tuple(state_names)
        self.masters = patches.master_tensors(optimizer)
        self.average = average
        self.shards = make_shards(parameters, shapes, groups)
        self.fragments = self._fragments(parameters, groups, saved_elsewhere)
        self._sub_group: int | None = None
        self._stack = ExitStack()

    def _fragments(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: ProcessGroups,
        saved_elsewhere: Collection[str],
    ) -> list[list[Fragment]]:
        """The fragments of each master tensor."""
        names = {parameter: name for name, parameter in parameters.items()}
        here, tp = groups.coordinates, groups.grid.tp
        replicas = 1 if patches.is_partitioned(self.optimizer) else groups.grid.replicas
        replica = dist.get_rank(groups.replica) if replicas > 1 else 0
        parts = [(i, part) for i, master in enumerate(self.masters) for part in master.parts]
        written = [False] * len(parts)
        # ranks that hold the same values share out the saving
        for sharded in (True, False):
            chosen = [
                n
                for n, (_, part) in enumerate(parts)
                if (shard_dim(names[part.parameter]) is not None) == sharded
            ]
            tensor_copies = 1 if sharded else tp
            n_copies = replicas * tensor_copies
            own = replica * tensor_copies + (0 if sharded else here.tensor)
            sizes = [parts[n][1].size for n in chosen]
            for n, writer in zip(chosen, assign_writers(sizes, n_copies), strict=True):
                written[n] = writer == own
        fragments: list[list[Fragment]] = [[] for _ in self.masters]
        for (i, part), is_written in zip(parts, written, strict=True):
            name = names[part.parameter]
            shard = self.shards[name]
            end = min(part.begin + part.size, math.prod(shard.sizes))  # the rest is padding
            if end > part.begin:
                is_written = is_written and name not in saved_elsewhere
                fragments[i].append(Fragment(shard, part.begin, end, part.offset, is_written))
        return fragments

    def progress(self, step: int, skipped_steps: int) -> Progress:
        """The scalars of the state after these steps."""
        updates = [read_updates(m.optimizer, m.weights) for m in self.masters]
        scaler = patches.loss_scaler(self.optimizer)
        scale = None
        if scaler is not None:
            fields = {name: getattr(scaler, name, None) for name in LOSS_SCALE_FIELDS}
            scale = {name: float(value) for name, value in fields.items() if value is not None}
        return Progress(step, skipped_steps, max(updates, default=0), scale)

    def restore_loss_scale(self, progress: Progress) -> None:
        """Set fp16's dynamic loss scale, if both the state and this engine have one."""
        scaler = patches.loss_scaler(self.optimizer)
        if scaler is not None and progress.loss_scale is not None:
            for name, value in progress.loss_scale.items():
                if hasattr(scaler, name):
                    setattr(scaler, name, value if name == "cur_scale" else int(value))

    @contextmanager
    def reading(self) -> Iterator[list[StateTensor]]:
        """The tensors, to read inside."""
        with self._stack:
            yield [
                StateTensor(name, dtype, self.fragments[i], partial(self._read, i, name))
                for i, master in enumerate(self.masters)
                for name, dtype in self._existing(master).items()
            ]
            self._leave_sub_group()

    def _existing(self, master: MasterTensor) -> dict[str, torch.dtype]:
        """Name and dtype of a master tensor and of the states that it has."""
        states = master.optimizer.state.get(master.weights, {})
        found = {n: states[n].dtype for n in self.state_names if states.get(n) is not None}
        if self.average is not None:
            found[EMA] = torch.float32
        return {WEIGHT: master.weights.dtype, **found}

    @contextmanager
    def _read(self, i: int, name: str) -> Iterator[Values]:
        master = self.masters[i]
        self._enter_sub_group(master, changes=False)
        state = master.optimizer.state.get(master.weights, {})
        if name == WEIGHT:
            yield Values(master.weights.detach().view(-1))
        elif name == EMA:
            yield self._averages(i)
        else:
            yield state_to_read(state, name)

    def _averages(self, i: int) -> Values:
        assert self.average is not None
        return Values(self.average[i].view(-1))

    @contextmanager
    def filling(self, states: Sequence[str], updates: int) -> Iterator[list[StateTensor]]:
        """The master weights and these states, to fill inside; then the weights follow.

        The states get `updates` as their counter. Leaving it is collective.
        """
        patches.prepare_for_new_weights(self.optimizer)
        created: set[int] = set()
        with self._stack:
            yield [
                StateTensor(
                    name,
                    master.weights.dtype,
                    self.fragments[i],
                    partial(self._fill, i, name, states, updates, created),
                )
                for i, master in enumerate(self.masters)
                for name in (WEIGHT, *self._states_of(master, states))
            ]
            self._leave_sub_group()
        patches.update_weights(self.optimizer)

    def _states_of(self, master: MasterTensor, states: Sequence[str]) -> list[str]:
        own = [state for state in states if state != EMA]
        of_optimizer = states_of(master.optimizer.param_groups[master.param_group], own)
        return [*of_optimizer, *([EMA] if EMA in states else [])]

    @contextmanager
    def _fill(
        self, i: int, name: str, states: Sequence[str], updates: int, created: set[int]
    ) -> Iterator[Values]:
        if name == EMA:
            yield self._averages(i)
            return
        master = self.masters[i]
        inner, weights = master.optimizer, master.weights
        self._enter_sub_group(master, changes=True)
        if {*states} - {EMA} and i not in created:
            created.add(i)
            create_states(inner, master.param_group, weights)
            set_updates(inner, master.param_group, weights, updates)
        if name == WEIGHT:
            yield Values(weights.detach().view(-1))
            return
        with state_to_fill(inner.state[weights], name) as values:
            yield values

    def _enter_sub_group(self, master: MasterTensor, *, changes: bool) -> None:
        """Have a master tensor and its states in memory, one sub-group on NVMe at a time."""
        if master.sub_group == self._sub_group:
            return
        self._leave_sub_group()
        group = master.sub_group
        if group is not None and patches.is_on_nvme(self.optimizer, group):
            context: AbstractContextManager[None] = patches.sub_group_in_memory(
                self.optimizer, group, changes=changes
            )
            self._stack.enter_context(context)
            self._sub_group = group

    def _leave_sub_group(self) -> None:
        self._stack.close()
        self._sub_group = None
