"""What the ranks of each pipeline stage will hold in memory, from shapes alone.

Counted are the tensors that DeepSpeed 0.19.8 and autograd keep: weights, gradients at their most
(in the last backward pass before a step), the optimizer's, and activations. Buckets, temporary
results and what an allocator does not give back come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fgpt.config.resolve import Resolved
from fgpt.parallel.pipeline.partition import layer_names, layer_params, stage_bounds
from fgpt.parallel.tensor.sharding import local_config
from fgpt.plan.activations import Activations


@dataclass(frozen=True)
class StageRow:
    """One rank of a pipeline stage; all ranks of a stage hold as much."""

    stage: int
    first: str
    """Name of its first layer."""
    last: str
    """Name of its last layer."""
    params: int
    """Parameters on the rank, before ZeRO shards them."""
    weights: int
    """Bytes."""
    gradients: int
    """Bytes, at their most."""
    optimizer: int
    """Bytes of the optimizer's moments and of its copy of the weights."""
    in_flight: int
    """Micro-batches between their forward and their backward pass, at most."""
    activations: int
    """Bytes, of all of them."""
    host: int
    """Bytes offloaded to the host's memory."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations


def stage_table(resolved: Resolved) -> list[StageRow]:
    """A row for each stage of a DeepSpeed run, in order; without a pipeline there is one."""
    run, batch = resolved.run, resolved.batch
    bounds = stage_bounds(run.model, batch.pp, run.parallel.partition)
    names = layer_names(run.model)
    activations, states = Activations(resolved), state_bytes(resolved)
    rows = []
    for stage, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        layers, in_flight = names[begin:end], min(batch.accumulation, batch.pp - stage)
        params = rank_params(resolved, layers)
        rows.append(
            StageRow(
                stage=stage,
                first=layers[0],
                last=layers[-1],
                params=params,
                weights=int(params * states.weights),
                gradients=int(params * states.gradients),
                optimizer=int(params * states.optimizer),
                in_flight=in_flight,
                activations=activations.stage(stage, layers, in_flight),
                host=int(params * states.host),
            )
        )
    return rows


def rank_params(resolved: Resolved, layers: Sequence[str]) -> int:
    """Parameters of these layers on one tensor-parallel rank.

    A tied head's matrix is the embedding's where one stage has both, and a copy where not.
    """
    local = local_config(resolved.run.model, resolved.batch.tp)
    own = dict(zip(layer_names(local), layer_params(local), strict=True))
    shared = own["head"] if local.tied_head and {"embedding", "head"} <= set(layers) else 0
    return sum(own[layer] for layer in layers) - shared


@dataclass(frozen=True)
class StateBytes:
    """Bytes for each parameter on a rank; fractions, where ZeRO shards."""

    weights: Fraction
    gradients: Fraction
    optimizer: Fraction
    host: Fraction


def state_bytes(resolved: Resolved) -> StateBytes:
    """What is kept of a parameter beside activations, and where."""
    replicas = resolved.batch.dp * resolved.batch.cp
    zero = resolved.deepspeed["zero_optimization"]

    def each(size: int, sharded_from: int) -> Fraction:
        return Fraction(size, replicas if resolved.zero_stage >= sharded_from else 1)

    def offloads(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") != "none"

    offloaded = offloads("offload_optimizer")
    weights = each(resolved.element_bytes, 3)
    gradients = each(_gradient_bytes(resolved, offloaded), 2)
    optimizer, host = each(_optimizer_bytes(resolved), 1), Fraction(0)
    if offloaded:
        host += optimizer + each(4, 1)  # its gradients are fp32
        # ZeRO-1 moves them when they are complete, the others as they come
        gradients, optimizer = gradients if resolved.zero_stage == 1 else Fraction(0), Fraction(0)
    if offloads("offload_param"):
        weights, host = Fraction(0), host + weights
    return StateBytes(weights, gradients, optimizer, host)


def _gradient_bytes(resolved: Resolved, offloaded: bool) -> int:
    if resolved.precision == "fp32":
        return 4
    asked = resolved.deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    if not (asked and resolved.batch.adds_gradients):
        return 2
    # bf16 with ZeRO-1: DeepSpeed's BF16_Optimizer has its sums beside the gradients
    beside = resolved.precision == "bf16" and resolved.zero_stage == 1 and not offloaded
    return 6 if beside else 4


def _optimizer_bytes(resolved: Resolved) -> int:
    """Its moments, and its copy of the weights: with ZeRO there is one in fp32, too."""
    optimizer, bf16 = resolved.deepspeed["optimizer"], resolved.deepspeed.get("bf16", {})
    params = optimizer.get("params", {})
    n_moments = {"Adam": 2, "AdamW": 2, "Adagrad": 1, "Lion": 1, "SGD": 0}[optimizer["type"]]
    n_moments += bool(params.get("amsgrad")) + (params.get("momentum", 0) > 0)
    copied = resolved.zero_stage > 0 or resolved.precision != "fp32"
    copy = 2 if bf16.get("bf16_master_weights_and_grads") else 4
    moment = 2 if bf16.get("bf16_optimizer_states") else 4
    return copied * copy + n_moments * moment


def render_stages(rows: Sequence[StageRow], console: Console) -> None:
    """Print the table."""
    table = Table(title="memory of a rank", title_justify="left", box=None, pad_edge=False)
    names = ["parameters", "weights", "gradients", "optimizer", "activations", "in all"]
    names += ["on the host"] if any(row.host for row in rows) else []
    for column in ("stage", "layers"):
        table.add_column(column, no_wrap=True)
    for column in names:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        sizes = [row.weights, row.gradients, row.optimizer, row.activations, row.total, row.host]
        layers = f"{row.first} .. {row.last}"
        cells = [f"{row.params:,}", *(f"{size / 2**20:,.1f}" for size in sizes)][: len(names)]
        table.add_row(*(Text(cell) for cell in (str(row.stage), layers, *cells)))
    # under a launcher there is no terminal, and no width to fold it to
    console.print(table, width=max(console.width, 110), crop=False)
    console.print(Text("in MiB, without buckets and temporary results"))
