"""A non-finite gradient in one stage: every stage skips the step and counts it.

The plain engine with the same NaN in the same gradient is the reference.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from tests.engine.runs import full_weights, resolved_run, train_steps, variant
from tests.engine.test_equality import BOUNDS, largest
from tests.ranks import run_ranks

STEPS, BAD = 6, 3
IN_STAGE = {0: "blocks.0.mlp.up.bias", 1: "blocks.3.mlp.up.bias"}
ZERO1 = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}
CONFIGS = {
    "fp32 zero0": {},
    "fp32 zero1": ZERO1,
    "bf16 zero1": {**ZERO1, **BF16, "data_types": {"grad_accum_dtype": "fp32"}},
}


@contextlib.contextmanager
def planted(parameter):
    """Put a NaN into this parameter's gradient; None: another rank has the parameter."""

    def spoil(gradient):
        gradient = gradient.clone()
        gradient[7] = torch.nan
        return gradient

    hook = None if parameter is None else parameter.register_hook(spoil)
    yield
    if hook is not None:
        hook.remove()


def with_nan(world, folder, config, settings, name):
    """STEPS steps; in step BAD the gradient of parameter `name` has a NaN."""
    resolved = resolved_run(folder / str(world.rank), config, world.size, **settings)
    engine = build_engine(resolved, world, torch.device("cpu"))
    parameters = engine.parameters() if world.size > 1 else dict(engine.model.named_parameters())
    out = [train_steps(resolved, world, engine, BAD)]
    before = full_weights(engine)
    with planted(parameters.get(name)):
        out.append(train_steps(resolved, world, engine, 1))
    after = full_weights(engine)
    out.append(train_steps(resolved, world, engine, STEPS - BAD - 1))
    skipped_steps = engine.skipped_steps
    engine.close()
    return {
        "steps": {key: [x for part in out for x in part[key]] for key in out[0]},
        "unchanged": all(torch.equal(before[n], after[n]) for n in before),
        "skipped_steps": skipped_steps,
    }


def each(world, folder, cases):
    """`with_nan` for each (JSON, settings, name), in the same processes."""
    return {key: with_nan(world, folder, *case) for key, case in cases.items()}


@pytest.mark.dist
@pytest.mark.timeout(180)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_stages_skip(tmp_path, precision):
    names = [name for name in CONFIGS if name.startswith(precision)]
    cases = {
        (name, stage): (variant(**CONFIGS[name]), {"parallel__pp": 2}, parameter)
        for name in names
        for stage, parameter in IN_STAGE.items()
    }
    half = BF16 if precision == "bf16" else {}
    plain = {"train__engine": "plain"}
    wanted = with_nan(World(), tmp_path / "plain", variant(**half), plain, IN_STAGE[0])["steps"]
    assert wanted["skipped"] == [step == BAD for step in range(STEPS)]
    loss, norm, _ = BOUNDS[precision]
    for found in run_ranks(each, 2, tmp_path / "ranks", cases, timeout_s=170):
        for key, run in found.items():
            steps = run["steps"]
            assert steps["skipped"] == wanted["skipped"], key
            assert run["unchanged"] and run["skipped_steps"] == 1, key
            assert steps["rate"] == pytest.approx(wanted["rate"], rel=1e-12), key
            assert largest(steps["loss"], wanted["loss"]) < loss, key
            good = [i for i in range(STEPS) if i != BAD]
            assert (
                largest([steps["norm"][i] for i in good], [wanted["norm"][i] for i in good]) < norm
            )
            assert not torch.isfinite(torch.tensor(steps["norm"][BAD])), key
