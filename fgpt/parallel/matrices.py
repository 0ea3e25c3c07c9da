"""Whole matrices from the parts that ranks keep of them, for Muon's orthogonalization.

A rank keeps ranges of its shards of matrices: all of a shard without ZeRO, a range of some under
ZeRO-1 and 2, the same fraction of each under ZeRO-3. Each matrix gets an owner among the ranks that
keep it. In rounds of bounded size:

    1. every rank sends its ranges to the owners       all-to-all
    2. owners put matrices together, update them, and take them apart
    3. owners send the ranges back                     all-to-all

So each matrix is computed once, and no rank needs more memory than for its share of a round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fgpt.distributed.agreements import gather_json
from fgpt.optim.muon import MatrixUpdate
from fgpt.parallel.tensor.sharding import shard_box, shard_parameter, unshard_parameter

ROUND_ELEMENTS = 2**24
"""Elements that a rank owns in one round, at most; of a larger matrix, one."""


class KeptRange(NamedTuple):
    """The elements [begin, end) of a flattened shard of a matrix, at `offset` of a tensor."""

    name: str
    begin: int
    end: int
    offset: int


@dataclass(frozen=True)
class Matrix:
    """Which rank of a group keeps what of one matrix."""

    name: str
    shape: tuple[int, ...]
    """Of the whole matrix."""
    ranges: tuple[tuple[int, int], ...]
    """(begin, end) of each rank's range of its shard; (0, 0): it keeps nothing."""
    owner: int = 0

    def n_kept(self, rank: int) -> int:
        """Elements that a rank keeps."""
        begin, end = self.ranges[rank]
        return end - begin

    @property
    def work(self) -> int:
        """Operations of a Newton-Schulz iteration, up to a factor."""
        return math.prod(self.shape) * min(self.shape)


def plan_rounds(matrices: Iterable[Matrix], n_ranks: int) -> list[list[Matrix]]:
    """Return the matrices in rounds, each with its owner: the rank that keeps most of it, and of
    several such the one with the least to do.

    In each round every owner has up to ROUND_ELEMENTS, until it has no more: under ZeRO-1 and 2,
    consecutive matrices belong to one rank, and the others would wait for it.
    """
    work, left = [0] * n_ranks, [0] * n_ranks
    owned: list[list[list[Matrix]]] = [[] for _ in range(n_ranks)]  # by owner and round
    for matrix in matrices:
        most = max(matrix.n_kept(rank) for rank in range(n_ranks))
        holders = [rank for rank in range(n_ranks) if matrix.n_kept(rank) == most]
        owner, size = min(holders, key=work.__getitem__), math.prod(matrix.shape)
        if not owned[owner] or size > left[owner]:
            owned[owner].append([])
            left[owner] = ROUND_ELEMENTS
        left[owner] -= size
        work[owner] += matrix.work
        owned[owner][-1].append(replace(matrix, owner=owner))
    return [list(chain(*parts)) for parts in zip_longest(*owned, fillvalue=())]


def sent_elements(rounds: Iterable[Sequence[Matrix]], rank: int) -> int:
    """Elements that a rank sends in these rounds, to the owners and back."""
    sent = 0
    for matrix in (matrix for matrices in rounds for matrix in matrices):
        if matrix.owner == rank:
            sent += sum(end - begin for begin, end in matrix.ranges)
            sent -= matrix.n_kept(rank)
        else:
            sent += matrix.n_kept(rank)
    return sent


class ShardedMatrices:
    """`fgpt.optim.muon.Orthogonalize` for the parameters of a DeepSpeed engine. Collective."""

    def __init__(
        self,
        kept: Sequence[tuple[Tensor, Sequence[KeptRange]]],
        shapes: Mapping[str, torch.Size],
        tp: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        update: MatrixUpdate,
    ):
        """`kept`: the optimizer's tensors and what is in them; all ranks of `group` have as many.
        `shapes`: of full parameters. `group`: its `tp` tensor ranks are innermost; None: this rank
        keeps all. `device`: where matrices are multiplied. All ranks call this together.
        """
        self.tp, self.group, self.device, self.update = tp, group, device, update
        self.rank = 0 if group is None else dist.get_rank(group)
        self.n_ranks = 1 if group is None else dist.get_world_size(group)
        self._index = {tensor: i for i, (tensor, _) in enumerate(kept)}
        self._offsets = [{part.name: part.offset for part in parts} for _, parts in kept]
        here = [[part[:3] for part in parts] for _, parts in kept]
        tables = [here] if group is None else gather_json(here, device, group)
        self._matrices = [
            list(_matrices([table[i] for table in tables], shapes)) for i in range(len(kept))
        ]
        self._rounds: dict[tuple[int, ...], list[list[tuple[int, Matrix]]]] = {}

    def __call__(self, parameters: Sequence[Tensor], momenta: Sequence[Tensor]) -> None:
        flat = {self._index[p]: m.view(-1) for p, m in zip(parameters, momenta, strict=True)}
        for matrices in self._planned(tuple(flat)):
            self._run_round(matrices, flat)

    def _planned(self, tensors: tuple[int, ...]) -> list[list[tuple[int, Matrix]]]:
        """(tensor, matrix) of each round for these tensors."""
        if tensors not in self._rounds:
            of_name = {m.name: i for i in tensors for m in self._matrices[i]}
            matrices = [matrix for i in tensors for matrix in self._matrices[i]]
            rounds = plan_rounds(matrices, self.n_ranks)
            self._rounds[tensors] = [[(of_name[m.name], m) for m in round_] for round_ in rounds]
        return self._rounds[tensors]

    def _run_round(
        self, matrices: Sequence[tuple[int, Matrix]], flat: Mapping[int, Tensor]
    ) -> None:
        ranks = range(self.n_ranks)
        # 1. the ranges here, by owner
        kept = [[self._kept(i, m, flat) for i, m in matrices if m.owner == rank] for rank in ranks]
        owned = [matrix for _, matrix in matrices if matrix.owner == self.rank]
        outgoing = [
            [t.to(self.device, self.update.momentum_dtype) for t in tensors] for tensors in kept
        ]
        # 2. the ranges of owned matrices, from every rank
        sizes = [[matrix.n_kept(rank) for matrix in owned] for rank in ranks]
        incoming = self._exchange(outgoing, sizes)
        # 3. whole matrices, updated, and their ranges again
        whole = [
            self._whole(matrix, [incoming[rank][n] for rank in ranks])
            for n, matrix in enumerate(owned)
        ]
        updated = self._update(owned, whole)
        returned = [
            [self._range(matrix, full, rank) for matrix, full in zip(owned, updated, strict=True)]
            for rank in ranks
        ]
        # 4. back to where they came from
        results = self._exchange(returned, [[len(t) for t in tensors] for tensors in outgoing])
        for targets, values in zip(kept, results, strict=True):
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)

    def _kept(self, i: int, matrix: Matrix, flat: Mapping[int, Tensor]) -> Tensor:
        offset = self._offsets[i].get(matrix.name, 0)
        return flat[i][offset : offset + matrix.n_kept(self.rank)]

    def _exchange(
        self, outgoing: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]
    ) -> list[list[Tensor]]:
        """Send `outgoing[r]` to each rank r; return what each rank r sends here, of `sizes[r]`."""
        received: list[list[Tensor]] = [[] for _ in sizes]
        if self.group is not None:
            # what stays here is not copied
            send = [[] if r == self.rank else list(out) for r, out in enumerate(outgoing)]
            n_sent = [sum(map(len, tensors)) for tensors in send]
            n_received = [0 if r == self.rank else sum(s) for r, s in enumerate(sizes)]
            like = torch.empty(0, dtype=self.update.momentum_dtype, device=self.device)
            buffer = torch.cat([like, *(t for tensors in send for t in tensors)])
            target = like.new_empty(sum(n_received))
            dist.all_to_all_single(target, buffer, n_received, n_sent, group=self.group)
            parts = target.split(n_received)
            received = [
                list(part.split(list(size))) if r != self.rank else []
                for r, (part, size) in enumerate(zip(parts, sizes, strict=True))
            ]
        received[self.rank] = list(outgoing[self.rank])
        return received

    def _whole(self, matrix: Matrix, ranges: Sequence[Tensor]) -> Tensor:
        """The matrix of these ranges, one of each rank."""
        order = sorted(range(self.n_ranks), key=lambda rank: matrix.ranges[rank])
        shards = [
            torch.cat([ranges[rank] for rank in order if rank % self.tp == t])
            for t in range(self.tp)
        ]
        sizes = [shard_box(matrix.name, matrix.shape, t, self.tp)[1] for t in range(self.tp)]
        views = [shard.view(size) for shard, size in zip(shards, sizes, strict=True)]
        return unshard_parameter(matrix.name, views, torch.Size(matrix.shape))

    def _range(self, matrix: Matrix, full: Tensor, rank: int) -> Tensor:
        """What a rank keeps of a whole matrix."""
        begin, end = matrix.ranges[rank]
        shard = shard_parameter(matrix.name, full, rank % self.tp, self.tp)
        return shard.reshape(-1)[begin:end]

    def _update(self, matrices: Sequence[Matrix], whole: Sequence[Tensor]) -> list[Tensor]:
        """Update matrices, those of a shape together."""
        split = [self.update.split(m.name, full) for m, full in zip(matrices, whole, strict=True)]
        by_shape: dict[torch.Size, list[tuple[int, int]]] = {}
        for i, parts in enumerate(split):
            for n, part in enumerate(parts):
                by_shape.setdefault(part.shape, []).append((i, n))
        for places in by_shape.values():
            updated = self.update(torch.stack([split[i][n] for i, n in places]))
            for (i, n), result in zip(places, updated, strict=True):
                split[i][n] = result
        return [self.update.join(m.name, parts) for m, parts in zip(matrices, split, strict=True)]


def _matrices(
    tables: Sequence[Sequence[Sequence[Any]]], shapes: Mapping[str, torch.Size]
) -> Iterator[Matrix]:
    """The matrices in one tensor. `tables`: (name, begin, end) of what each rank keeps."""
    kept = [{name: (begin, end) for name, begin, end in table} for table in tables]
    for name in dict.fromkeys(name for table in kept for name in table):
        ranges = tuple(table.get(name, (0, 0)) for table in kept)
        yield Matrix(name, tuple(shapes[name]), ranges)
