"""The run file's schedule in every engine: the plain engine's rates and losses, skips included."""

import pytest
import torch

from fgpt.config.schema import ScheduleConfig
from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from fgpt.optim.run_schedule import rate_factor
from tests.engine.runs import micro_batches, resolved_run, variant
from tests.engine.test_equality import BOUNDS, largest
from tests.ranks import run_ranks

STEPS, BAD = 8, (0, 4)
SCHEDULE = {
    "schedule__kind": "wsd",
    "schedule__warmup_steps": 2,
    "schedule__decay_steps": 2,
    "schedule__total_steps": 6,
    "train__steps": 6,
}
BF16 = {"bf16": {"enabled": True}}
# name -> (changes of the JSON, settings, whether accelerate builds it)
ENGINES = {
    **{f"fp32 zero{n}": ({"zero_optimization": {"stage": n}}, {}) for n in range(4)},
    "fp32 offload": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {},
    ),
    "fp32 pp2": ({"zero_optimization": {"stage": 1}}, {"parallel__pp": 2}),
    "bf16 zero1": ({"zero_optimization": {"stage": 1}, **BF16}, {}),
    "fp32 accelerate": ({"zero_optimization": {"stage": 1}}, {}, True),  # it sets variables: last
}


def trained(world, folder, changes, settings, accelerate=False):
    """Losses, rates and skips of STEPS steps; those of BAD have gradients that are not finite."""
    config = variant(**changes)
    del config["scheduler"]
    settings = {**SCHEDULE, "model__n_layer": 2, **settings}
    resolved = resolved_run(folder / str(world.rank), config, world.size, **settings)
    engine = build_engine(resolved, world, torch.device("cpu"), accelerate=accelerate)
    parameter = next(engine.model.parameters())
    out = []
    for step in range(STEPS):
        hook = parameter.register_hook(lambda grad: grad * torch.nan) if step in BAD else None
        out.append(engine.train_batch(micro_batches(resolved, world, step)).result())
        if hook is not None:
            hook.remove()
    engine.close()
    return {
        "loss": [result.loss for result in out],
        "rate": [result.learning_rate for result in out],
        "skipped": [result.skipped for result in out],
    }


def each(world, folder, cases):
    """`trained` for each case, in the same processes."""
    return {name: trained(world, folder, *case) for name, case in cases.items()}


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_every_engine_has_the_plain_engines_rates(tmp_path):
    plain = {"train__engine": "plain"}
    wanted = {
        "fp32": trained(World(), tmp_path / "fp32", {}, plain),
        "bf16": trained(World(), tmp_path / "bf16", BF16, plain),
    }
    schedule = ScheduleConfig("wsd", 2, 2, "1-sqrt", 0.0, 6)
    applied = [0, 0, 1, 2, 3, 3, 4, 5]  # a skipped step takes its rate again
    rates = [1e-3 * rate_factor(schedule, k) for k in applied]
    for run in wanted.values():
        assert run["rate"] == rates and run["skipped"] == [s in BAD for s in range(STEPS)]
    for run in run_ranks(each, 2, tmp_path, ENGINES):
        for name, found in run.items():
            precision = name.split()[0]
            assert found["rate"] == rates, name
            assert found["skipped"] == wanted[precision]["skipped"], name
            close = BOUNDS[precision][0]
            assert largest(found["loss"], wanted[precision]["loss"]) < close, name
