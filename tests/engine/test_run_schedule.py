"""The run file's schedule in every engine: the plain engine's values and losses, with skips."""

import pytest
import torch

from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from fgpt.engine.deepspeed.optimizer_step import ScheduleState
from tests.engine.runs import micro_batches, resolved_run, variant
from tests.engine.test_equality import BOUNDS, largest
from tests.ranks import run_ranks

STEPS, BAD = 8, (0, 4)
SCHEDULE = {
    "schedule__kind": "wsd",
    "schedule__warmup_steps": 2,
    "schedule__decay_steps": 2,
    "schedule__total_steps": 6,
    "schedule__momentum_warmup_steps": 4,
    "schedule__momentum_start": 0.5,
    "schedule__weight_decay": "with_lr",
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
    out, momentum, decay = [], [], []

    def record():
        """Read the values that the step uses."""
        optimizer = engine.optimizer if world.size == 1 else engine.deepspeed.optimizer
        betas = [tuple(group["betas"]) for group in optimizer.param_groups]
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert len(set(betas)) == 1 and len(decays) == 2 and decays[1] == 0
        momentum.append(betas[0])
        decay.append(decays[0])

    if world.size > 1:
        engine.on_gradients = record
    for step in range(STEPS):
        hook = parameter.register_hook(lambda grad: grad * torch.nan) if step in BAD else None
        out.append(engine.train_batch(micro_batches(resolved, world, step)).result())
        if hook is not None:
            hook.remove()
        if world.size == 1:
            record()
    engine.close()
    return {
        "loss": [result.loss for result in out],
        "rate": [result.learning_rate for result in out],
        "betas": momentum,
        "decay": decay,
        "skipped": [result.skipped for result in out],
    }


def each(world, folder, cases):
    """`trained` for each case, in the same processes."""
    return {name: trained(world, folder, *case) for name, case in cases.items()}


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_every_engine_has_the_plain_engines_values(tmp_path):
    plain = {"train__engine": "plain"}
    wanted = {
        "fp32": trained(World(), tmp_path / "fp32", {}, plain),
        "bf16": trained(World(), tmp_path / "bf16", BF16, plain),
    }
    # 1. by hand; a skipped step takes its values again
    applied = [0, 0, 1, 2, 3, 3, 4, 5]
    factors = [1 / 2, 1 / 2, 1, 1, 1, 1, 1 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5]
    values = {
        "rate": [1e-3 * factor for factor in factors],
        "decay": [0.1 * factor for factor in factors],
        "betas": [(0.5 + 0.4 * min(k, 4) / 4, 0.95) for k in applied],
    }
    for run in wanted.values():
        for name in values:
            assert run[name] == [pytest.approx(value, rel=1e-12) for value in values[name]], name
        assert run["skipped"] == [s in BAD for s in range(STEPS)]
    # 2. the values change the losses
    own = {"schedule__momentum_warmup_steps": 0, "schedule__momentum_start": None}
    other = trained(World(), tmp_path / "own", {}, {**plain, **own})
    assert largest(other["loss"], wanted["fp32"]["loss"]) > 100 * BOUNDS["fp32"][0]
    # 3. every engine has them, and the plain engine's losses
    for run in run_ranks(each, 2, tmp_path, ENGINES):
        for name, found in run.items():
            expected = wanted[name.split()[0]]
            for key in ("rate", "decay", "betas", "skipped"):
                assert found[key] == expected[key], (name, key)
            close = BOUNDS[name.split()[0]][0]
            assert largest(found["loss"], expected["loss"]) < close, name


def test_a_roll_back_restores_the_momentum_too():
    """Of DeepSpeed's OneCycle, which changes Adam's betas with the rate."""
    from deepspeed.runtime.lr_schedules import OneCycle

    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters])
    schedule = OneCycle(optimizer, 0.001, 0.01, cycle_first_step_size=4)
    state = ScheduleState(optimizer, schedule)

    def values():
        return [(group["lr"], group["betas"]) for group in optimizer.param_groups]

    schedule.step()
    before = values()
    state.record()
    schedule.step()
    after = values()
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in zip(before, after, strict=True))
    state.roll_back()
    assert values() == before and state.used == before[0][0]
    schedule.step()
    assert values() == after
