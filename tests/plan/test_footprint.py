"""Predicted memory of planned runs: by hand, and beside a few published figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fgpt.config.schema import ModelConfig
from fgpt.config.speed import fuses_loss
from fgpt.plan.activation_memory import chunks_in_flight, loss_memory, megatron_block_saved_bytes
from fgpt.plan.cluster import Cluster, find_device
from fgpt.plan.footprint import GIB, Fit, fits, interval, rank_memory, worst_stage
from fgpt.plan.judge_memory import judge_memory, render
from fgpt.plan.memory import stage_table
from fgpt.plan.planned_run import PlannedRun
from fgpt.plan.published import PublishedRun
from fgpt.plan.shapes_of_rank import stage_shapes
from fgpt.plan.state_memory import planned_states
from tests.plan.conftest import BF16, FP32_SUMS, Plan, zero

H, HEADS, SEQ = 1024, 16, 512
GPT = ModelConfig(
    vocab_size=51200, max_seq_len=SEQ, n_layer=8, d_model=H, n_head=HEADS, dropout=0.1
)
UNFUSED = replace(GPT, attention="reference")
FLASH = replace(GPT, dropout=0.0)


def planned(model: ModelConfig = GPT, **fields: Any) -> PlannedRun:
    defaults: dict[str, Any] = dict(
        seq_len=SEQ,
        micro=2,
        accumulation=8,
        precision="bf16",
        engine="megatron",
        kernels="megatron",
    )
    return PlannedRun(model=model, **{**defaults, "partition": "type:block", **fields})


def cluster(gpus: int = 8, device: str = "a100-80g", per_node: int = 8) -> Cluster:
    return Cluster(find_device(device), gpus, per_node, 1600.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # weights 2, gradients 4, fp32 weights 4, two states 8
        ({"dp": 4}, 18),
        # Megatron's distributed optimizer: 6 + 12 / dp
        ({"dp": 4, "zero_stage": 1}, 6 + 12 / 4),
        ({"dp": 2, "cp": 2, "zero_stage": 1}, 6 + 12 / 4),
        # fp16 of 2020: 2 + 2 + 12
        ({"precision": "fp16", "gradient_bytes": 2}, 16),
        ({"precision": "fp32"}, 4 + 4 + 8),
        # DeepSpeed: 16-bit gradients beside fp32 sums
        ({"dp": 4, "engine": "deepspeed", "zero_stage": 1}, 2 + 6 + 12 / 4),
        ({"dp": 4, "engine": "deepspeed", "zero_stage": 1, "gradient_bytes": 2}, 2 + 2 + 12 / 4),
        ({"dp": 4, "engine": "deepspeed", "zero_stage": 2, "gradient_bytes": 2}, 2 + 14 / 4),
        ({"dp": 4, "engine": "deepspeed", "zero_stage": 3, "gradient_bytes": 2}, 16 / 4),
        # 8-bit Adam
        ({"dp": 4, "zero_stage": 1, "state_bytes": 2.0}, 6 + 6 / 4),
        # torch FSDP: fp32 shards of weights, gradients and states
        ({"dp": 8, "engine": "fsdp", "zero_stage": 3}, 16 / 8),
        # hybrid sharding within a node
        ({"dp": 16, "engine": "fsdp", "zero_stage": 3, "shards": 8}, 16 / 8),
    ],
)
def test_states_by_hand(fields: dict[str, Any], expected: float) -> None:
    states = planned_states(planned(**fields))
    assert states.weights + states.gradients + states.master + states.optimizer == expected
    run = planned(**fields)
    memory, shapes = rank_memory(run, cluster(), 0), stage_shapes(run, 0)
    held = memory.weights + memory.gradients + memory.master_weights + memory.optimizer
    assert held == pytest.approx(shapes.params * expected, abs=4)


def test_optimizer_in_host_memory() -> None:
    run = planned(dp=2, engine="deepspeed", zero_stage=2, gradient_bytes=2, offloads_optimizer=True)
    memory, params = rank_memory(run, cluster(), 0), stage_shapes(run, 0).params
    assert (memory.optimizer, memory.master_weights, memory.gradients) == (0, 0, 0)
    assert memory.host == params * 16 // 2


def test_parameters_by_hand() -> None:
    """2 tensor ranks, 2 stages: 4 blocks each; both stages hold the tied matrix."""
    matrices = 12 * H * H // 2
    biases = 3 * H // 2 + H + 4 * H // 2 + H
    block = matrices + biases + 4 * H
    embedding = 51200 // 2 * H
    run = planned(tp=2, pp=2)
    assert stage_shapes(run, 0).params == 4 * block + embedding + SEQ * H
    assert stage_shapes(run, 1).params == 4 * block + embedding + 2 * H
    # 50,257 rows, padded to a multiple of 128 x tp
    odd = planned(replace(GPT, vocab_size=50257), tp=2)
    assert stage_shapes(odd, 0).local.vocab_size == 50432 // 2


@pytest.mark.parametrize(
    ("tp", "sequence", "per_token"),
    [
        # Korthikanti et al. 2022, table 2, divided by s b; 5 a s / h = 40
        (1, False, H * (34 + 5 * HEADS * SEQ / H)),
        (4, False, H * (10 + 24 / 4 + 5 * HEADS * SEQ / (4 * H))),
        (4, True, H * (34 + 5 * HEADS * SEQ / H) / 4),
    ],
)
def test_activations_of_unfused_blocks(tp: int, sequence: bool, per_token: float) -> None:
    run = planned(UNFUSED, tp=tp, sequence=sequence)
    memory = rank_memory(run, cluster(), 0)
    tokens = 2 * SEQ
    stream = tokens // (tp if sequence else 1)
    embedding = stream * H + 8 * tokens  # dropout mask, token numbers
    assert memory.activations == 8 * tokens * per_token + embedding


def test_activations_without_scores() -> None:
    saved = megatron_block_saved_bytes(FLASH, 2, SEQ)
    assert sum(saved) == 32 * H + 4 * HEADS
    swiglu = replace(FLASH, activation="swiglu", d_ff=3 * H, norm="rmsnorm", n_kv_head=4)
    # norms 4, inputs of qkv and up 4, q 2, k and v 1, attention's output 2, gate, up and product 18
    assert sum(megatron_block_saved_bytes(swiglu, 2, SEQ)) == 31 * H + 4 * HEADS
    assert sum(megatron_block_saved_bytes(UNFUSED, 2, SEQ, keeps_scores=False)) == 34 * H


@pytest.mark.parametrize(
    ("tp", "sequence", "divisor"), [(1, False, 1), (4, False, 1), (4, True, 4)]
)
def test_full_recomputation_keeps_inputs(tp: int, sequence: bool, divisor: int) -> None:
    full = rank_memory(planned(FLASH, tp=tp, sequence=sequence, recompute="full"), cluster(), 0)
    tokens = 2 * SEQ
    assert full.activations == 8 * 2 * tokens * H // divisor + 8 * tokens
    whole = rank_memory(planned(FLASH, tp=tp, sequence=sequence), cluster(), 0)
    block = (whole.activations - 8 * tokens) // 8
    assert full.recomputed == block


def test_half_of_the_blocks_recomputed() -> None:
    none, half, full = (
        rank_memory(planned(FLASH, **fields), cluster(), 0).activations
        for fields in (
            {},
            {"recompute": "full", "recomputed_share": 0.5},
            {"recompute": "full"},
        )
    )
    assert half == (none + full) // 2


@pytest.mark.parametrize(
    ("pp", "interleave", "accumulation", "expected"),
    [
        (4, 1, 8, [4, 3, 2, 1]),
        (4, 1, 2, [2, 2, 2, 1]),
        # 2 (pp - stage - 1) + (v - 1) pp + 1
        (4, 3, 4, [12, 12, 11, 9]),  # of 12 chunks
        (4, 3, 8, [15, 13, 11, 9]),
        # 5 micro-batches leave a rest of 1, less than pp: groups of 5
        (4, 3, 5, [15, 15, 13, 11]),
        (4, 3, 10, [17, 15, 13, 11]),
    ],
)
def test_in_flight(pp: int, interleave: int, accumulation: int, expected: list[int]) -> None:
    run = planned(pp=pp, interleave=interleave, accumulation=accumulation)
    assert [chunks_in_flight(run, stage) for stage in range(pp)] == expected


def test_loss_by_hand() -> None:
    """Megatron-LM: 16-bit logits and an fp32 copy, which becomes softmax and gradient."""
    run = planned(FLASH, tp=2)
    head = 2 * SEQ * (2 * H + 8 + 2 * H + 8)  # inputs and statistics of norm and head, targets
    assert rank_memory(run, cluster(), 0).logits == 2 * SEQ * 25600 * 6 + head
    fused = planned(FLASH, engine="deepspeed", kernels="fgpt", loss="fused")
    assert rank_memory(fused, cluster(), 0).logits == 4 * 51200 * H + 2 * SEQ * (4 * H + 8)
    in_place = planned(FLASH, engine="fsdp", kernels="fgpt", loss="in_place")
    assert rank_memory(in_place, cluster(), 0).logits == 2 * SEQ * (51200 * 4 + 4 * H + 16)


def test_sums() -> None:
    run = planned(
        UNFUSED, engine="deepspeed", precision="fp16", gradient_bytes=2, dp=4, zero_stage=1
    )
    memory = rank_memory(run, cluster(), 0)
    states = memory.weights + memory.gradients + memory.master_weights + memory.optimizer
    backward = memory.activations + max(memory.recomputed, memory.logits)
    assert memory.lasting == states + memory.buckets + memory.workspace
    assert memory.allocated == memory.lasting + max(backward, memory.flat_step)
    # fp32 and 16-bit gradients of a quarter of the parameters
    assert memory.flat_step == stage_shapes(run, 0).params * 6 // 4
    outside = memory.context + memory.nccl
    assert memory.device_total == memory.lasting + backward + memory.flat_step + outside
    apex = rank_memory(replace(run, engine="megatron"), cluster(), 0)
    assert (apex.flat_step, apex.step) == (0, stage_shapes(run, 0).params)
    assert apex.device_total == apex.lasting + max(apex.backward, apex.step) + outside
    assert memory.reserved_or_smi == memory.device_total + memory.fragmentation
    low, high = interval(100.0)
    assert low < 100 < high


@pytest.mark.parametrize("flags", [(), ("--pp", "2"), ("--tp", "2"), ("--cp", "2")])
@pytest.mark.parametrize("recompute", ["none", "full", "cheap"])
@pytest.mark.parametrize("sequence", [False, True])
def test_one_truth(flags: tuple[str, ...], recompute: str, sequence: bool, plan: Plan) -> None:
    """FGPT's own runs: the same bytes as `fgpt check`'s table."""
    sets = ["--set", f"parallel.sequence={str(sequence).lower()}"] if "--tp" in flags else []
    sets += ["--set", "speed.recompute=cheap"] if recompute == "cheap" else []
    ds = zero(1) | BF16 | FP32_SUMS | {"gradient_accumulation_steps": 4}
    if recompute != "none":
        ds["activation_checkpointing"] = {}
    resolved = plan(*flags, *sets, world=4, ds=ds)
    batch = resolved.batch
    run = planned(
        resolved.run.model, seq_len=resolved.seq_len, micro=batch.micro, accumulation=4,
        engine="deepspeed", kernels="fgpt", tp=batch.tp, pp=batch.pp, cp=batch.cp, dp=batch.dp,
        zero_stage=1, recompute=recompute, sequence=resolved.run.parallel.sequence,
        partition=resolved.run.parallel.partition,
        loss="fused" if fuses_loss(resolved.run, resolved.precision) else "plain",
    )  # fmt: skip
    for row in stage_table(resolved):
        memory = rank_memory(run, cluster(4), row.stage)
        loss = loss_memory(run).kept if row.last == "head" else 0
        assert stage_shapes(run, row.stage).params == row.params
        assert memory.activations + memory.recomputed + loss == row.activations
        assert (memory.weights, memory.gradients) == (row.weights, row.gradients)
        states = memory.master_weights + memory.optimizer
        assert states == pytest.approx(row.optimizer, abs=1)


def test_worst_stage_and_fit() -> None:
    run = planned(UNFUSED, pp=4)
    worst = worst_stage(run, cluster())
    every = [rank_memory(run, cluster(), stage).device_total for stage in range(4)]
    assert worst.device_total == max(every)
    assert worst == rank_memory(run, cluster(), worst.stage)
    fit = fits(run, cluster())
    assert fit == Fit(worst.stage, worst.device_total / GIB, 79.1)
    assert fit.is_possible and fit.margin_gib == pytest.approx(79.1 - fit.predicted_gib)
    assert not fits(replace(run, micro=400), cluster()).is_possible


def test_stages_between_the_ends() -> None:
    """No stage needs more than those that `worst_stage` looks at."""
    models = [replace(UNFUSED, n_layer=n) for n in (8, 9, 10, 11)]
    for model in (*models, replace(FLASH, tied_head=False)):
        for fields in ({}, {"recompute": "full"}, {"interleave": 2}, {"engine": "deepspeed"}):
            run = planned(model, pp=4, **fields)
            every = [rank_memory(run, cluster(), stage).device_total for stage in range(4)]
            assert worst_stage(run, cluster()).device_total == max(every)


MEGATRON_12X512 = ModelConfig(
    vocab_size=50257, max_seq_len=1024, n_layer=12, d_model=512, n_head=8, dropout=0.1,
    attention="reference",
)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "gib"),
    [
        # golden values of Megatron-LM's functional tests on A100, peak of allocated bytes of the
        # last rank (d98e8a64dd): gpt3_mcore_te_tp1_pp1_dist_optimizer_no_mmap_bin_files, ...
        ({"dp": 8, "accumulation": 1, "zero_stage": 1}, 4.352),
        ({"pp": 4, "dp": 2, "accumulation": 4, "interleave": 3}, 3.840),
        ({"pp": 4, "dp": 2, "accumulation": 5, "interleave": 3}, 4.281),
        ({"tp": 2, "pp": 2, "dp": 2, "accumulation": 4}, 1.770),
        ({"dp": 8, "accumulation": 1, "recompute": "full"}, 2.360),
    ],
)
def test_golden_values(fields: dict[str, Any], gib: float) -> None:
    run = planned(MEGATRON_12X512, seq_len=1024, micro=4, **fields)
    memory = rank_memory(run, cluster(), run.pp - 1)
    assert memory.allocated / GIB == pytest.approx(gib, rel=0.03)


BLOOM = ModelConfig(
    vocab_size=250880, max_seq_len=2048, n_layer=80, d_model=14400, n_head=96, dropout=0.1,
    attention="reference",
)  # fmt: skip
JEAN_ZAY = {"engine": "deepspeed", "zero_stage": 1, "recompute": "full", "seq_len": 2048}
FP16 = {"precision": "fp16", "gradient_bytes": 2, "reduced_bytes": 2}


@pytest.mark.parametrize(
    ("model", "fields", "gb"),
    [
        # nvidia-smi of the first stage's nodes (bigscience, chronicles-prequel.md)
        (BLOOM, FP16 | {"tp": 8, "pp": 10, "micro": 1, "accumulation": 2048}, 73),
        (BLOOM, FP16 | {"tp": 8, "pp": 10, "dp": 4, "micro": 1, "accumulation": 512}, 35),
        (
            replace(BLOOM, n_layer=70, d_model=14336, n_head=128),
            {"tp": 4, "pp": 12, "dp": 8, "micro": 2, "accumulation": 128, "partition": "uniform"},
            60,
        ),
    ],
)
def test_bigscience(model: ModelConfig, fields: dict[str, Any], gb: float) -> None:
    run = planned(model, **{**JEAN_ZAY, **fields})
    memory = rank_memory(run, cluster(run.ranks), 0)
    assert memory.reserved_or_smi / GIB == pytest.approx(gb, rel=0.06)


def test_out_of_memory_was_predicted() -> None:
    """24 layers of 2,048 on 2 stages: micro-batches of 4 ran on V100 of 16 GB, 8 did not."""
    model = replace(BLOOM, vocab_size=50304, n_layer=24, d_model=2048, n_head=16)
    run = planned(model, pp=2, dp=4, micro=4, accumulation=32, **{**JEAN_ZAY, **FP16})
    v100 = cluster(8, "v100-16g", per_node=4)
    assert fits(run, v100).is_possible
    assert not fits(replace(run, micro=8, accumulation=16), v100).is_possible


def published(name: str, memory_gib: float | None, **fields: Any) -> PublishedRun:
    values: dict[str, Any] = dict(
        set="some-set", quality="A", run=planned(), cluster=cluster(), micro_is_published=True,
        step_s=None, memory_gib=memory_gib, memory_gb=None, memory_kind="allocated, last rank",
        is_out_of_memory=False,
    )  # fmt: skip
    return PublishedRun(id=name, **{**values, **fields})


def test_judge() -> None:
    predicted = rank_memory(planned(), cluster(), 0)
    exact, smi = predicted.allocated / GIB, predicted.reserved_or_smi / GIB
    huge = planned(micro=4000)
    errors = judge_memory(
        [
            published("low", exact / 0.9),
            published("high", exact / 1.2),
            published("smi", None, memory_gb=smi, memory_kind="nvidia-smi"),
            published("reserved", predicted.reserved / GIB, memory_kind="reserved"),
            published("noisy", 1.0, quality="C"),
            published("nothing", None),
            published("failed", None, is_out_of_memory=True),
            published("failed as said", None, is_out_of_memory=True, run=huge),
            published("ran", rank_memory(huge, cluster(), 0).allocated / GIB, run=huge),
        ]
    )  # fmt: skip
    (found,) = errors
    assert (found.n, found.is_fitted, found.worst_id) == (5, False, "high")
    assert found.worst == pytest.approx(0.2)
    assert found.median == pytest.approx(0, abs=1e-9)
    assert found.bias == pytest.approx((0.2 - 0.1) / 5)
    assert (found.out_of_memory, found.out_of_memory_found) == (2, 1)
    assert found.wrongly_impossible == ("ran",)
    row = render(errors).splitlines()[-1]
    assert row == "| some-set | 5 | held out | 0.0 % | +20.0 % | +2.0 % | 1 of 2 | 1 of 6 |"


@pytest.mark.parametrize(
    ("stage", "overlaps", "pp", "expected"),
    [(0, True, 1, 0), (1, False, 1, 4), (1, True, 1, 8), (2, True, 1, 4), (3, True, 1, 2)],
)
def test_reduce_buffers_have_their_full_size(
    stage: int, overlaps: bool, pp: int, expected: int
) -> None:
    """Bytes for each element of a bucket that is larger than the model."""
    run = PlannedRun(
        ModelConfig(), 256, 1, 1, "bf16", dp=2, pp=pp, zero_stage=stage,
        bucket_elements=10**8, overlaps_reduction=overlaps,
    )  # fmt: skip
    cluster = Cluster(find_device("a100-80g"), 2, 2, 100.0)
    assert rank_memory(run, cluster, 0).buckets // 10**8 == expected
