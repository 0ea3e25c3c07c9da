"""The training state in a checkpoint of format version 1, by logical names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgpt.checkpoint.version1 import Manifest1, read_pickle
from fgpt.checkpoint.version1_layout import (
    Parameter,
    Piece,
    fragments_of,
    parameter_groups,
    partition_pieces,
    rank_parameters,
    shard_pieces,
)
from fgpt.config.deepspeed.settings import DeepSpeedSettings
from fgpt.config.schema import ModelConfig
from fgpt.engine.deepspeed.state import LOSS_SCALE_FIELDS
from fgpt.engine.state import WEIGHT, Fragment, Progress, StateTensor, Values
from fgpt.errors import CheckpointError
from fgpt.optim.optimizers import OPTIMIZERS
from fgpt.optim.quantized import BLOCK
from fgpt.parallel.tensor.sharding import full_shapes
from fgpt.parallel.topology import Grid, GridCoordinates

PLAIN_FILE = "plain_engine.pt"
"""The plain engine's only file."""
_QUANTIZED = "__bnb_optimizer_quant_state__"
"""bitsandbytes' name of a parameter's 8-bit states."""


@dataclass(frozen=True)
class RankState:
    """The state of one rank."""

    rank: int
    tensors: list[StateTensor]
    progress: Progress


class _Flats(NamedTuple):
    """The flat tensors of one rank."""

    weights: Sequence[Tensor]
    """Master weights."""
    optimizer: Mapping[str, Any]
    """The state_dict of a torch optimizer of them."""
    pieces: list[list[Piece]]
    """What is in each."""


class State1:
    """The state in one checkpoint.

    Contents that no FGPT has written raise CheckpointError, or what Python raises for them.
    """

    def __init__(self, path: Path, manifest: Manifest1):
        self.path, self.manifest = path, manifest
        self.file_names = {file.name for file in manifest.files}
        identity = manifest.identity
        prefix = "model."
        model = {n.removeprefix(prefix): v for n, v in identity.items() if n.startswith(prefix)}
        self.model = ModelConfig(**model)
        self.shapes = full_shapes(self.model)
        """Logical name -> shape of the full parameter."""
        tp, pp = identity["tensor-parallel ranks (tp)"], identity["pipeline stages (pp)"]
        cp = identity["context-parallel ranks (cp)"]
        self.grid = Grid(pp, identity["number of ranks"] // (tp * pp * cp), cp, tp)
        self.settings = DeepSpeedSettings(manifest.config["deepspeed"])
        optimizer = OPTIMIZERS[identity["optimizer"].lower()]
        self.state_names = optimizer.state_names(self.settings.optimizer_params)

    def ranks(self) -> Iterator[RankState]:
        """The state of each rank that has its own; the files of one rank are open at a time."""
        if PLAIN_FILE in self.file_names:
            yield self._plain_rank()
            return
        for model_rank in range(self.grid.pp * self.grid.tp):
            for replica in range(self.grid.replicas):
                name = f"zero_pp_rank_{replica}_mp_rank_{model_rank:02d}_optim_states.pt"
                partitions = [n for n in (name, f"bf16_{name}") if n in self.file_names]
                if partitions or replica == 0:
                    yield self._deepspeed_rank(model_rank, replica, partitions)

    def _plain_rank(self) -> RankState:
        saved = self._read(PLAIN_FILE)
        groups = parameter_groups(self._parameters(stage=0), None)
        flats = _flats_of_each(groups, lambda _: saved["masters"], saved["optimizer"])
        return self._rank_state(GridCoordinates(0, 0, 0, 0), flats, saved["skipped_steps"], {})

    def _deepspeed_rank(
        self, model_rank: int, replica: int, partitions: Sequence[str]
    ) -> RankState:
        """`partitions`: the name of the file with this rank's partitions, if there is one."""
        stage, tensor = divmod(model_rank, self.grid.tp)
        # 1. the model's file
        name = f"mp_rank_{model_rank:02d}_model_states.pt"
        sharded = f"zero_pp_rank_{replica}_{name}"
        model = self._read(sharded if sharded in self.file_names else name)
        if model["global_steps"] != self.manifest.step:
            raise CheckpointError(f"{name} is of step {model['global_steps']}")
        groups = parameter_groups(self._parameters(stage), model["param_shapes"])
        # 2. the optimizer's
        saved = model["optimizer"]
        if partitions:
            saved = self._read(partitions[0])["optimizer_state_dict"]
        flats = self._flats(saved, groups, replica)
        if flats is None:
            read = partial(self._weights, model["module"], tensor)
            flats = _flats_of_each(groups, read, saved)
        at = GridCoordinates(stage, *divmod(replica, self.grid.cp), tensor)
        return self._rank_state(at, flats, model["skipped_steps"], saved)

    def _parameters(self, stage: int) -> dict[str, Parameter]:
        partition = self.manifest.identity["parallel.partition"]
        return rank_parameters(self.model, self.grid, partition, stage)

    def _read(self, name: str) -> dict[str, Any]:
        if name not in self.file_names:
            raise CheckpointError(f"{name} is missing")
        return read_pickle(self.path / name)

    def _weights(
        self, module: Mapping[str, Tensor] | None, tensor: int, parameters: Sequence[Parameter]
    ) -> list[Tensor]:
        """The weights in the model's file, or in those of a pipeline's layers."""
        if module is not None:
            return [module[parameter.deepspeed_name] for parameter in parameters]
        layers = {
            i: self._read(f"layer_{i:02d}-model_{tensor:02d}-model_states.pt")
            for i in sorted({parameter.layer for parameter in parameters})
        }
        return [layers[parameter.layer][parameter.name_in_layer] for parameter in parameters]

    def _flats(
        self, saved: Mapping[str, Any], groups: list[list[Parameter]], replica: int
    ) -> _Flats | None:
        """The flat tensors in the state of one of DeepSpeed's optimizers; None: it wraps none."""
        replicas = self.grid.replicas
        if "single_partition_of_fp32_groups" in saved:  # ZeRO-1/2, BF16_Optimizer
            paddings = saved.get("param_alignment_paddings")
            pieces = partition_pieces(groups, paddings, replica, replicas)
            partitions = saved["single_partition_of_fp32_groups"]
            return _Flats(partitions, saved["base_optimizer_state"], pieces)
        if "fp32_flat_groups" in saved:  # ZeRO-3
            pieces = shard_pieces(groups, replica, replicas)
            return _Flats(saved["fp32_flat_groups"], saved["optimizer_state_dict"], pieces)
        if "fp32_groups_flat" in saved:  # FP16_Optimizer
            pieces = shard_pieces(groups)
            return _Flats(saved["fp32_groups_flat"], saved["optimizer_state_dict"], pieces)
        if "fp32_groups" in saved:  # FP16_UnfusedOptimizer
            masters = list(chain.from_iterable(saved["fp32_groups"]))
            return _flats_of_each(groups, lambda _: masters, saved["optimizer_state_dict"])
        return None

    def _rank_state(
        self, at: GridCoordinates, flats: _Flats, skipped_steps: int, saved: Mapping[str, Any]
    ) -> RankState:
        rank = self.grid.rank(at)
        tensors: list[StateTensor] = []
        state_names: set[tuple[str, ...]] = set()
        updates = 0
        for i, (weights, pieces) in enumerate(zip(flats.weights, flats.pieces, strict=True)):
            # 1. the tensors: of bitsandbytes in a dictionary, of NVMe in a file
            state = dict(flats.optimizer["state"].get(i, {}))
            state |= state.get(_QUANTIZED, {})
            if (on_nvme := f"nvme_rank_{rank}_group_{i}.pt") in self.file_names:
                state |= self._read(on_nvme)
                weights = state["weights"]
            updates = max(updates, int(state.get("step", 0)))
            # 2. what is in them
            fragments = list(fragments_of(pieces, self.shapes, at.pipe, at.tensor, self.grid))
            end = max((p.offset + p.end - p.begin for p in pieces), default=0)
            named = dict(self._values(weights, state))
            state_names.add(tuple(named))
            for name, values in named.items():
                _check_size(values, end)
                tensors.append(_readable(name, values, fragments))
        if len(state_names) > 1:
            raise CheckpointError(
                "it lacks optimizer states of some parameters: DeepSpeed does not save those that"
                " zero_optimization.offload_optimizer.ratio keeps on the GPU"
            )
        scale = _loss_scale(saved)
        return RankState(rank, tensors, Progress(self.manifest.step, skipped_steps, updates, scale))

    def _values(self, weights: Tensor, state: Mapping[str, Any]) -> Iterator[tuple[str, Values]]:
        """Name and values of the master weights and of the states that they have."""
        yield WEIGHT, Values(weights.detach().reshape(-1))
        for name in self.state_names:
            if state.get(name) is not None:
                number = name.removeprefix("state")
                scales, codebook = state.get(f"absmax{number}"), state.get(f"qmap{number}")
                yield name, Values(state[name].reshape(-1), scales, codebook)


def _flats_of_each(
    groups: list[list[Parameter]],
    weights: Callable[[Sequence[Parameter]], Sequence[Tensor]],
    optimizer: Mapping[str, Any],
) -> _Flats:
    """One tensor for each parameter, in the order of the groups."""
    parameters = list(chain.from_iterable(groups))
    return _Flats(weights(parameters), optimizer, shard_pieces([[p] for p in parameters]))


def _readable(name: str, values: Values, fragments: list[Fragment]) -> StateTensor:
    """A state tensor that is in memory."""
    return StateTensor(name, values.flat.dtype, fragments, lambda: nullcontext(values))


def _check_size(values: Values, n_elements: int) -> None:
    """Raise CheckpointError if a flat tensor has less than the parameters in it."""
    flat, scales, codebook = values.flat, values.scales, values.codebook
    is_right = len(flat) >= n_elements
    if flat.dtype == torch.uint8:
        is_right &= scales is not None and scales.numel() == -(-len(flat) // BLOCK)
        is_right &= codebook is not None and codebook.numel() == 256
    if not is_right:
        raise CheckpointError("its tensors do not have the sizes of the layout in its manifest")


def _loss_scale(saved: Mapping[str, Any]) -> dict[str, float] | None:
    """The state of fp16's dynamic loss scale: ZeRO's object, or fields of other optimizers."""
    scaler = vars(saved["loss_scaler"]) if "loss_scaler" in saved else saved
    if not (scaler.get("dynamic") or scaler.get("dynamic_loss_scale")):
        return None
    fields = {name: scaler.get(name) for name in LOSS_SCALE_FIELDS}
    return {name: float(value) for name, value in fields.items() if value is not None}
