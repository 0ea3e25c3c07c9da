"""Each rule finds its wrong twin, its advice works, and it is in ds_configs/README.md."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from fgpt.config.deepspeed.settings import set_at
from fgpt.config.field_syntax import blend_text, parse_blend, parse_stages, stages_text
from fgpt.config.resolve import RULES, Examined, Resolved, RunRequest, examine
from tests.config.conftest import GOOD, ROOT, merged, write
from tests.config.twins import (
    BF16,
    CP2,
    FP16,
    FP32_SUMS,
    PLAIN,
    PP2,
    TP2,
    TWINS,
    Twin,
    checkpointing,
    data,
    model,
    offload,
    optimizer,
    parallel,
    schedule,
    scheduler,
    speed,
    stage,
)


def test_every_rule_has_a_wrong_twin() -> None:
    ids = [rule.id for rule in RULES]
    assert len(ids) == len(set(ids))
    assert set(ids) == set(TWINS)


EACH_TWIN = pytest.mark.parametrize(
    ("rule", "twin"),
    [pytest.param(rule, twin, id=rule) for rule, twins in TWINS.items() for twin in twins],
)
GRADES = {rule.id: rule.grade for rule in RULES}


@pytest.fixture
def examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Examined]:
    """examine() of dictionaries, without optional packages and a C++ compiler."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)

    def run(ds: dict[str, Any], run_file: dict[str, Any], world: int, device: str) -> Examined:
        file = write(tmp_path / "run.json", run_file)
        request = RunRequest(Path("ds.json"), run_file=file, deepspeed=ds)
        return examine(request, world=world, device=device)

    return run


def rule_ids(examined: Examined) -> set[str]:
    """The rules with errors and warnings."""
    texts = [str(issue) for issue in examined.issues if issue.grade != "note"]
    return {text.rpartition(" [")[2].rstrip("]") for text in texts if text.endswith("]")}


@EACH_TWIN
def test_a_wrong_twin_is_found(rule: str, twin: Twin, examined: Callable[..., Examined]) -> None:
    found = examined(merged(GOOD, twin.ds), twin.run, twin.world, twin.device)
    assert rule_ids(found) == {rule, *twin.beside}
    assert (found.resolved is None) == (GRADES[rule] == "error")


@EACH_TWIN
def test_followed_advice_is_accepted(
    rule: str, twin: Twin, examined: Callable[..., Examined]
) -> None:
    """Following each remedy once leads to a configuration without findings."""
    ds, run = merged(GOOD, twin.ds), merged({}, twin.run)
    found = examined(ds, run, twin.world, twin.device)
    errors = [issue for issue in found.issues if issue.grade == "error"]
    if any(issue.where == "processes" for issue in errors):
        return  # the remedy is another number of processes
    assert all(issue.edits for issue in errors)
    for issue in errors:
        for edit in issue.edits:
            root, _, path = edit.path.partition(".")
            set_at(ds if root == "deepspeed" else run, path, edit.value)
    again = examined(ds, run, twin.world, twin.device)
    assert again.resolved is not None, [str(issue) for issue in again.issues]
    # what was dropped or translated is not reported again
    last = examined(again.resolved.deepspeed, run, twin.world, twin.device)
    assert last.resolved is not None
    assert last.resolved.fingerprint() == again.resolved.fingerprint()
    assert [i for i in last.issues if i.grade == "warning" and i.edits] == []


def test_the_good_one_is_good(issues: Callable[..., list[str]]) -> None:
    assert issues(GOOD) == []


RIGHT: list[Twin] = [
    Twin(run=speed(compile="blocks", cuda_graphs=True, loss="fused"), device="cuda"),
    Twin(checkpointing(number_checkpoints=2), speed(recompute="cheap")),
    Twin(run=speed(loss="plain", matmul="torch", compile="off") | TP2, world=2),
    Twin(BF16 | stage(1), PLAIN),
    Twin(BF16, PLAIN),
    Twin(stage(3), PLAIN),
    Twin(offload(2) | optimizer("Lion")),
    Twin(stage(3) | optimizer("Lion"), device="cuda"),
    Twin(optimizer("Lamb", max_coeff=5.0), device="cuda"),
    Twin(offload(3) | optimizer("Adagrad")),
    Twin(optimizer("Adagrad")),
    Twin(optimizer("sgd", momentum=0.9)),
    Twin(stage(3) | optimizer("SGD") | {"zero_allow_untested_optimizer": True}),
    Twin(optimizer("Adam", adam_w_mode=False)),
    Twin(offload(3, ratio=0.5) | optimizer("AdamW")),
    Twin(
        offload(2)
        | optimizer("AdamW")
        | {
            "bf16": {
                "enabled": True,
                "bf16_optimizer_states": True,
                "bf16_master_weights_and_grads": True,
            }
        }
    ),
    Twin(stage(0, overlap_comm=False, offload_optimizer={"device": "none"})),
    Twin(stage(2, reduce_scatter=False) | {"prescale_gradients": True}),
    Twin({"fp16": {"enabled": False, "hysteresis": 2}, "bf16": {"enabled": False}}),
    Twin({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}} | stage(2), device="cuda"),
    Twin(BF16 | stage(1) | {"data_types": {"grad_accum_dtype": "fp32"}}),
    Twin(checkpointing(number_checkpoints=2)),
    Twin(checkpointing(cpu_checkpointing=True), device="cuda"),
    Twin({"activation_checkpointing": {}}),
    Twin({"steps_per_print": 10, "wall_clock_breakdown": True, "log_level": "warning"}),
    Twin({"csv_monitor": {"enabled": True, "output_path": "runs/csv", "job_name": "x"}}),
    Twin({"comms_logger": {"enabled": True, "verbose": True}}),
    Twin({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}, world=2),
    Twin(scheduler("OneCycle", cycle_min_lr=0.001, cycle_max_lr=0.01)),
    Twin(scheduler("LRRangeTest", lr_range_test_min_lr=0.0001)),
    Twin({"gradient_accumulation_steps": 4}, {"train": {"batch_ramp": "0:8, 10:16,99:32"}}),
    Twin({"train_batch_size": 32}, {"train": {"batch_ramp": [[0, 16], [500, 32]]}}, 2),
    Twin(run={"train": {"batch_ramp": "0:8", "engine": "plain"}}),
    Twin(run=schedule("wsd")),
    Twin(run=schedule("wsd", warmup_steps=100, decay_steps=300, decay_shape="cosine")),
    Twin(run=schedule("wsd", total_steps=800, min_ratio=0.1)),
    Twin(run=schedule("wsd", warmup_steps=0) | {"train": {"steps": 1}}),
    Twin(run=schedule("cosine", min_ratio=0.1), world=2),
    Twin(run=schedule("linear", warmup_steps=400)),
    Twin(run=schedule("constant", total_steps=300)),
    Twin(optimizer("SGD"), schedule("wsd")),
    Twin(optimizer("SGD", momentum=0.9), schedule("constant", momentum_warmup_steps=5)),
    Twin(run=schedule("wsd", momentum_warmup_steps=5, momentum_start=0.0)),
    Twin(
        {"optimizer": {"params": {"weight_decay": 0.1}}},
        schedule("constant", weight_decay="linear", total_steps=800),
    ),
    Twin(run=model(n_head=3, d_head=64)),
    Twin(run={"data": {"seq_len": 512}} | model(position="rotary")),
    Twin({"gradient_clipping": 0.1}, PP2, 2),
    Twin(offload(1), PP2, 2),
    Twin(BF16 | stage(1) | FP32_SUMS, PP2, 2),
    Twin(BF16 | offload(1) | FP32_SUMS, PP2 | model(tied_head=False), 2),
    Twin(FP16 | stage(1), PP2, 2, device="cuda"),
    Twin(FP16 | offload(1), PP2, 2, device="cuda"),
    Twin(stage(1, overlap_comm=False), PP2, 2),
    Twin({"steps_per_print": 2, "memory_breakdown": True}, PP2, 2),
    Twin(checkpointing(partition_activations=True, number_checkpoints=2), parallel(tp=2, cp=2), 4),
    Twin(
        stage(1) | checkpointing(partition_activations=True, cpu_checkpointing=True),
        parallel(tp=2, pp=2),
        4,
        device="cuda",
    ),
    Twin(
        checkpointing(
            contiguous_memory_optimization=True, partition_activations=True, number_checkpoints=2
        ),
        TP2,
        2,
    ),
    Twin(stage(3), parallel(tp=4) | model(vocab_size=50257), 4),
    Twin(stage(2), parallel(tp=2, cp=2, sequence=True), 8),
    Twin(stage(3), CP2, 2),
    Twin(stage(1), parallel(tp=2, pp=2, cp=2), 8),
    Twin(run=parallel(cp=2, sequence=False, partition="parameters"), world=2),
    *(
        Twin(stage(1), parallel(pp=2, partition=text), 2)
        for text in ("1,3", " 3 , 1 ", "uniform", "type:Block", "type:block", "type:layernorm")
    ),
    Twin(run=data(path="a:0.7, b:3,c:1e-6", packing="best_fit")),
    Twin(run=data(path="a:1")),
    Twin(run=data(stages="8e5=a:0.7,b:0.3; 810000 = c")),
    Twin(run=data(skip_samples="7-7, 1000 - 1031,1020-1040")),
    Twin(run=data(skip_samples=[[1000, 1031], [0, 0]]) | {"train": {"max_loss_jump": 0}}),
    Twin(run=data(document_mask=True, packing="best_fit", prefetch=0)),
    Twin(run=data(document_mask=True, reset_positions=True) | model(position="rotary")),
    Twin(stage(1), parallel(pp=2, partition="type:RMS") | model(norm="rmsnorm"), 2),
    Twin(stage(1), parallel(pp=2, partition="type:Identity") | model(norm_place="post"), 2),
]


@pytest.mark.parametrize("twin", RIGHT)
def test_right_twin_is_accepted(twin: Twin, issues: Callable[..., list[str]]) -> None:
    assert (
        issues(merged(GOOD, twin.ds), run_file=twin.run, world=twin.world, device=twin.device) == []
    )


@pytest.mark.parametrize(
    ("run", "world", "expected"),
    [
        (TP2, 3, "world 3 is not a multiple of tp 2 x pp 1 x cp 1 = 2 (world = tp x pp x cp x dp)"),
        (TP2 | model(n_kv_head=1), 2, "model.n_kv_head: 1 is not a multiple of tp 2 ->"),
        (CP2 | model(n_kv_head=1), 2, "model.n_kv_head: 1 is not a multiple of cp 2 ->"),
        (
            parallel(tp=2, cp=2) | model(n_kv_head=2),
            4,
            "model.n_kv_head: 2 is not a multiple of tp 2 x cp 2 = 4 ->",
        ),
        (TP2 | model(d_ff=63), 2, "model.d_ff: 63 is not a multiple of tp 2 ->"),
        (
            parallel(tp=2, cp=2, sequence=True) | {"data": {"seq_len": 30}},
            4,
            "data.seq_len: 30 is not a multiple of cp 2 x tp 2 = 4 ->",
        ),
        (parallel(pp=2, partition="3,2"), 2, "partition: 3,2 are 5 blocks, n_layer is 4 ->"),
        (parallel(pp=2, partition="2,1,1"), 2, "2,1,1 is for 3 stage(s), pp is 2 ->"),
        (parallel(pp=2, partition="0,4"), 2, "0,4 leaves stage 0 without a block ->"),
        (parallel(pp=2, partition="unifrom"), 2, "did you mean 'uniform'? ->"),
        (
            parallel(pp=2, partition="type:Attention"),
            2,
            "'type:Attention' matches no layer; there are InputEmbedding, Block, LayerNorm, Head",
        ),
    ],
)
def test_a_rule_says_the_numbers(
    run: dict[str, Any], world: int, expected: str, issues: Callable[..., list[str]]
) -> None:
    (found,) = issues(GOOD, run_file=run, world=world)
    assert expected in found


def test_parse_blocks_may_be_a_list(issues: Callable[..., list[str]]) -> None:
    assert issues(GOOD, run_file=parallel(pp=2, partition=[3, 1]), world=2) == []
    (found,) = issues(GOOD, run_file=parallel(pp=2, partition=[3, 2]), world=2)
    assert "partition: 3,2 are 5 blocks, n_layer is 4 ->" in found
    (found,) = issues(GOOD, run_file=parallel(pp=2, partition=[3, True]), world=2)
    assert "[3, true] is wrong -> must be" in found


def test_stages_may_be_a_list(config: Callable[..., Resolved]) -> None:
    blend = [{"path": "a", "weight": 0.7}, {"path": "~/b", "weight": 0.3}]
    stages = [{"tokens": 8e4, "path": "a"}, {"tokens": 90_000, "path": blend}]
    text = config(GOOD, run_file=data(stages=stages)).run.data.stages
    assert text == f"80000.0=a;90000=a:0.7,{Path.home()}/b:0.3"
    assert parse_stages(text) == [(8e4, "a"), (9e4, f"a:0.7,{Path.home()}/b:0.3")]
    for wrong in ([], [{"tokens": "9", "path": "a"}], [{"tokens": 9}], [{"tokens": 9, "path": 3}]):
        assert stages_text(wrong) is None


def test_a_ramp_may_be_a_list(issues: Callable[..., list[str]]) -> None:
    ds = merged(GOOD, {"train_batch_size": 32})
    assert issues(ds, run_file={"train": {"batch_ramp": [[0, 8], [9, 32]]}}) == []
    (found,) = issues(ds, run_file={"train": {"batch_ramp": [[0, 8], [9, 24]]}})
    assert "train.batch_ramp: ends at 24, the global batch is 32 -> end at 32, or set" in found
    (found,) = issues(ds, run_file={"train": {"batch_ramp": [[0, 12], [9, 32]]}})
    assert "12 is not a multiple of micro 8 x dp 1 = 8 -> write multiples of 8, or" in found
    (found,) = issues(ds, run_file={"train": {"batch_ramp": [[0, 8], [9, 8.5]]}})
    assert "[[0, 8], [9, 8.5]] is wrong -> must be" in found


def test_a_blend_may_be_a_list(issues: Callable[..., list[str]]) -> None:
    both = [{"path": "a", "weight": 0.7}, {"path": "b", "weight": 1e-6}]
    assert blend_text(both) == "a:0.7,b:1e-06"
    assert parse_blend("a:0.7,b:1e-06") == [("a", Fraction(7, 10)), ("b", Fraction(1, 10**6))]
    assert parse_blend("some/dir") == [("some/dir", 1)]
    assert issues(GOOD, run_file=data(path=both)) == []
    (found,) = issues(GOOD, run_file=data(path=[*both, {"path": "a", "weight": 1}]))
    assert "data.path: 'a' is listed twice -> write DIR, or DIR:0.7,DIR:0.3" in found
    for wrong in ([{"path": "a"}], [{"path": "a", "weight": True}], ["a:1"]):
        (found,) = issues(GOOD, run_file=data(path=wrong))
        assert "is wrong -> must be a string" in found


def test_readme_has_the_table() -> None:
    """ds_configs/README.md has each rule's reason and fix."""
    readme = (ROOT / "ds_configs" / "README.md").read_text()
    rows = [f"| `{rule.id}` | {rule.grade} | {rule.reason} | {rule.fix} |" for rule in RULES]
    assert [line for line in readme.splitlines() if line.startswith("| `")] == rows


def test_a_rule_that_needs_a_invalid_value_is_silent(issues: Callable[..., list[str]]) -> None:
    """stage "2" is one issue; the ZeRO-2 keys beside it are not checked against stage 0."""
    found = issues(merged(GOOD, {"zero_optimization": {"stage": "2", "overlap_comm": True}}))
    assert len(found) == 1 and "zero_optimization.stage" in found[0]
