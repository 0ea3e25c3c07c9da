"""A user's JSON trains as DeepSpeed alone trains it: the same file, model, weights and samples.

DeepSpeed gets the file itself. Only what a client script has to give is added: numbers for "auto",
an optimizer and a schedule where the file has none, torch's Adam in place of DeepSpeed's own, which
would be compiled first, and stage 1 in place of stage 0 in bf16, which DeepSpeed computes wrongly.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.config.deepspeed.settings import set_at, value_at, walk
from fgpt.config.resolve import Resolved, RunRequest, resolve
from fgpt.config.run_file import Override
from fgpt.distributed.agreements import mean_over_ranks
from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from fgpt.engine.deepspeed.ops import init_communication
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize
from fgpt.optim.build import parameter_groups
from fgpt.utils.keys import AUTO
from tests.engine.runs import SEQ_LEN, SMALL, micro_batches, train_steps
from tests.ranks import run_ranks

STEPS = 3
AUTOS = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
FILES: dict[str, dict[str, Any]] = {
    "trainer": {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "optimizer": {"type": "AdamW", "params": AUTOS},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": "auto",
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
            },
        },
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    },
    "no optimizer": {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1, "allgather_partitions": True},
        "zero_allow_untested_optimizer": True,
    },
    "stage 0 in bf16": {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "bfloat16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.01}},
    },
    **{
        f"bf16 states, stage {stage}": {
            "train_batch_size": 8,
            "bf16": {
                "enabled": True,
                "bf16_master_weights_and_grads": True,
                "bf16_optimizer_states": True,
            },
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": stage},
        }
        for stage in (2, 3)
    },
    "autocast": {
        "train_batch_size": 8,
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1},
    },
    "hpz": {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {
            "stage": 3,
            "zero_hpz_partition_size": 2,
            "stage3_param_persistence_threshold": 0,
        },
    },
    "old names": {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 6e-4, "betas": [0.9, 0.95]}},
        "zero_optimization": {
            "stage": 2,
            "cpu_offload": True,
            "stage3_max_live_parameters": 1e9,
            "offload_param": {"device": "cpu"},
        },
        "activation_checkpointing": {"partition_activations": False, "profile": False},
        "prescale_gradients": False,
        "backend": "nccl",
    },
}


def resolved_file(ds: dict[str, Any], world: int) -> Resolved:
    settings = {"data__seq_len": SEQ_LEN, "train__steps": 20, **SMALL}
    flags = tuple(Override(k.replace("__", "."), v, "--set") for k, v in settings.items())
    request = RunRequest(Path("own.json"), None, flags, deepspeed=ds)
    return resolve(request, world=world, device="cpu")


def by_fgpt(world: World, ds: dict[str, Any]) -> list[float]:
    resolved = resolved_file(ds, world.size)
    engine = build_engine(resolved, world, torch.device("cpu"))
    losses: list[float] = train_steps(resolved, world, engine, STEPS)["loss"]
    engine.close()
    return losses


def client_config(ds: dict[str, Any], resolved: Resolved) -> dict[str, Any]:
    """The file with numbers for "auto", as accelerate writes them."""
    config = copy.deepcopy(ds)
    for path, _, value in list(walk(config)):
        if value == AUTO:
            set_at(config, path, value_at(resolved.deepspeed, path))
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        config[name] = resolved.deepspeed[name]
    config["train_batch_size"] = resolved.batch.global_size
    for name in ("optimizer", "scheduler"):
        if name in resolved.deepspeed:
            config.setdefault(name, resolved.deepspeed[name])
    config["optimizer"].setdefault("params", {})["torch_adam"] = True
    if resolved.precision == "bf16" and "zero_optimization" not in config:
        # at stage 0 DeepSpeed takes a step on zero gradients first: Adam's count is one ahead, and
        # the early losses are 0.4 % off
        config["zero_optimization"] = {"stage": 1}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def by_deepspeed(world: World, ds: dict[str, Any]) -> list[float]:
    import deepspeed

    resolved = resolved_file(ds, world.size)
    config = client_config(ds, resolved)
    model = GPT(resolved.run.model)
    initialize(model, resolved.run.model, resolved.run.train.seed)
    init_communication("cpu")
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameter_groups(model.named_parameters()), config=config
    )
    losses = []
    for step in range(STEPS):
        parts = []
        for batch in micro_batches(resolved, world, step):
            loss = engine(batch.inputs, batch.targets)
            engine.backward(loss)
            engine.step()
            parts.append(loss.detach().float())
        losses.append(float(mean_over_ranks(torch.stack(parts).mean())))
    return losses


@pytest.mark.dist
@pytest.mark.parametrize("name", FILES)
def test_losses_are_deepspeeds(name: str) -> None:
    n = 4 if name == "hpz" else 2
    ours, theirs = (run_ranks(train, n, FILES[name])[0] for train in (by_fgpt, by_deepspeed))
    assert ours == pytest.approx(theirs, rel=5e-4 if "bf" in str(FILES[name]) else 1e-6)
    assert ours[0] != ours[-1]


@pytest.mark.dist
def test_hpz_changes_no_number() -> None:
    ds = copy.deepcopy(FILES["hpz"])
    with_hpz = run_ranks(by_fgpt, 4, ds)[0]
    del ds["zero_optimization"]["zero_hpz_partition_size"]
    assert with_hpz == pytest.approx(run_ranks(by_fgpt, 4, ds)[0], rel=1e-6)


@pytest.mark.dist
@pytest.mark.slow  # compiles DeepSpeed's own Adams
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "zero", [{"stage": 1}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}]
)
def test_torchs_adam_computes_the_same_as_deepspeeds(zero: dict[str, Any]) -> None:
    """Also in what the JSON leaves out: weight decay, betas and eps."""

    def losses(**params: Any) -> list[float]:
        adam = {"type": "AdamW", "params": {"lr": 0.01, **params}}
        ds = {"train_batch_size": 8, "optimizer": adam, "zero_optimization": zero}
        result: list[float] = run_ranks(by_fgpt, 2, ds, timeout_s=1700)[0]
        return result

    assert losses() == pytest.approx(losses(torch_adam=False), rel=1e-6)
    assert losses() != pytest.approx(losses(weight_decay=0.01), rel=1e-6)


def skip_without_libaio() -> None:
    """Skip the test where DeepSpeed's async_io cannot be built."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if not builder.is_compatible(verbose=False):
        pytest.skip("libaio is not installed")


@pytest.mark.dist
@pytest.mark.slow  # compiles DeepSpeed's async_io
@pytest.mark.timeout(700)
def test_nvme(tmp_path: Path) -> None:
    skip_without_libaio()
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    ds = {"train_batch_size": 8, "zero_optimization": zero}
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    in_memory = run_ranks(by_fgpt, 2, ds)[0]
    for offload in nvme_offloads(nvme):
        zero_nvme = ds | {"zero_optimization": zero | offload}
        on_nvme = run_ranks(by_fgpt, 2, zero_nvme, timeout_s=600)[0]
        assert on_nvme == pytest.approx(in_memory, rel=1e-6), offload
    assert list(tmp_path.iterdir()) == []


def nvme_offloads(nvme: dict[str, Any]) -> list[dict[str, Any]]:
    """Sections that offload weights, states and both to NVMe; sub-groups below 1 MiB stay in
    memory, and weights below max_in_cpu.
    """
    cpu = {"device": "cpu"}
    pipelined = {**nvme, "pipeline_read": True, "pipeline_write": True, "buffer_count": 12}
    weights = {**nvme, "max_in_cpu": 0}
    several = {"sub_group_size": 300_000}
    return [
        {"offload_param": nvme, "offload_optimizer": cpu},
        {"offload_optimizer": nvme, **several},
        {"offload_optimizer": pipelined, "offload_param": cpu, **several},
        {"offload_param": weights, "offload_optimizer": nvme, **several},
    ]
