"""Muon on DeepSpeed's parameters: it gets whole matrices from the ranks that keep parts of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fgpt.engine.deepspeed import patches
from fgpt.optim.muon import MatrixUpdate
from fgpt.parallel.matrices import KeptRange, ShardedMatrices
from fgpt.parallel.topology import ProcessGroups


def share_matrices(
    optimizer: Any,
    parameters: Mapping[str, nn.Parameter],
    shapes: Mapping[str, torch.Size],
    groups: ProcessGroups,
    device: torch.device,
    update: MatrixUpdate,
) -> None:
    """Complete the Muon inside DeepSpeed's `optimizer`. All ranks call this together.

    `parameters`: this rank's, by logical name; `shapes`: of the full ones; `device`: of the model.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    kept = []
    for master in patches.master_tensors(optimizer):
        muon = master.optimizer
        if muon.param_groups[master.param_group]["orthogonal"]:
            ranges = [
                KeptRange(names[part.parameter], part.begin, part.begin + part.size, part.offset)
                for part in master.parts
                if part.size > 0
            ]
            kept.append((master.weights, ranges))
    # without ZeRO every replica has the tensor ranks' whole shards
    is_partitioned = patches.is_partitioned(optimizer) and groups.grid.replicas > 1
    group = (groups.stage or groups.replica) if is_partitioned else groups.tensor
    muon.orthogonalize = ShardedMatrices(kept, shapes, groups.grid.tp, group, device, update)
