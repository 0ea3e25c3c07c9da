"""A batch ramp in every engine: the plain engine's losses and norms, in micro-batches of two."""

import pytest
import torch

from fgpt.data.loader import MicroBatch
from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from fgpt.parallel.topology import Grid
from tests.engine.runs import SEQ_LEN, resolved_run, variant
from tests.engine.test_equality import BOUNDS, largest
from tests.ranks import run_ranks

RAMP, STEPS = "0:4,1:8,3:16", 5
BF16 = {"bf16": {"enabled": True}}
CPU = {"device": "cpu"}


def zero(stage, **keys):
    return {"zero_optimization": {"stage": stage, **keys}}


# name -> (changes of the JSON, settings, whether accelerate builds it)
ENGINES = {
    **{f"fp32 zero{stage}": (zero(stage), {}) for stage in (0, 2, 3)},
    "fp32 offload2": (zero(2, offload_optimizer=CPU), {}),
    "fp32 offload3": (zero(3, offload_optimizer=CPU, offload_param=CPU), {}),
    "fp32 pp2": (zero(1), {"parallel__pp": 2}),
    "fp32 cp2": (zero(2), {"parallel__cp": 2}),
    "bf16 zero1": ({**zero(1), **BF16, "data_types": {"grad_accum_dtype": "fp32"}}, {}),
    "fp32 accelerate": (zero(1), {}, True),  # it sets variables: last
}


def ramped_micro_batches(resolved, world, step):
    """This rank's part of a global batch of the ramp."""
    batch = resolved.batch
    data = Grid.of(batch).coordinates(world.rank).data
    generator = torch.Generator().manual_seed(step)
    uniform = torch.rand(resolved.ramp.size_at(step), SEQ_LEN + 1, generator=generator)
    ids = (resolved.run.model.vocab_size * uniform**4).long()
    grid = ids.unflatten(0, (-1, batch.dp, batch.micro))
    return [MicroBatch(part[:, :-1], part[:, 1:]) for part in grid[:, data]]


def trained(world, folder, changes, settings, accelerate=False):
    """Losses, norms, and micro-batches per step and rank of STEPS steps, an evaluation between."""
    config = variant(**{"train_batch_size": 16, **changes})
    settings = {"train__batch_ramp": RAMP, "model__n_layer": 2, "model__dropout": 0.1, **settings}
    settings |= {"train__steps": STEPS}
    resolved = resolved_run(folder / str(world.rank), config, world.size, **settings)
    engine = build_engine(resolved, world, torch.device("cpu"), accelerate=accelerate)
    out, counts = [], []
    for step in range(STEPS):
        batches = ramped_micro_batches(resolved, world, step)
        counts.append(len(batches))
        out.append(engine.train_batch(batches).result())
        if step == 2:
            engine.eval_batches(ramped_micro_batches(resolved, world, STEPS))
    engine.close()
    return [r.loss for r in out], [r.grad_norm for r in out], counts


def each(world, folder, cases):
    """`trained` for each case, in the same processes."""
    return {name: trained(world, folder, *case) for name, case in cases.items()}


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_every_engine_trains_the_ramp_as_the_plain_engine(tmp_path):
    plain = {"train__engine": "plain"}
    wanted = {
        "fp32": trained(World(), tmp_path / "fp32", {}, plain),
        "bf16": trained(World(), tmp_path / "bf16", BF16, plain),
    }
    assert wanted["fp32"][2] == [2, 4, 4, 8, 8]
    for run in run_ranks(each, 2, tmp_path, ENGINES):
        for name, (losses, norms, counts) in run.items():
            expected, close = wanted[name.split()[0]], BOUNDS[name.split()[0]]
            dp = 1 if name in ("fp32 pp2", "fp32 cp2") else 2
            assert counts == [count // dp for count in expected[2]], name
            assert largest(losses, expected[0]) < close[0], name
            assert largest(norms, expected[1]) < close[1], name
