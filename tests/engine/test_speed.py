"""What `speed` does to a model, and that it changes no number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from fgpt.config.resolve import Resolved, resolve
from fgpt.data.loader import MicroBatch
from fgpt.distributed.launch import World
from fgpt.engine import speed
from fgpt.engine.activation_checkpointing import apply_checkpointing
from fgpt.engine.build import build_engine
from fgpt.engine.speed import apply_speed, prefer_fast_attention, use_fp8
from fgpt.errors import LaunchError
from fgpt.model.context import BatchContext
from fgpt.model.dropout import Dropout, drop
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize
from fgpt.model.kernels import compiled_chunk_loss, compiled_dropout
from fgpt.model.kernels.fp8_linear import fp8_linear
from fgpt.model.kernels.fused_head_loss import eager_chunk_loss
from fgpt.model.kv_cache import KVCache
from fgpt.model.linear import Linear, onednn_linear
from tests.config.conftest import GOOD, merged
from tests.run_flags import parse_run_flags

MODEL = {"vocab_size": 101, "max_seq_len": 160, "n_layer": 2, "d_model": 64, "n_head": 2}


@pytest.fixture(autouse=True)
def nothing_is_compiled_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none."""
    monkeypatch.setattr(compiled_chunk_loss, "compile_chunk_loss", lambda *_, **__: None)
    monkeypatch.setattr(compiled_dropout, "compile_drop", lambda *_: None)


def resolved(folder: Path, *flags: str, device: str = "cpu", **ds: Any) -> Resolved:
    (folder / "ds.json").write_text(json.dumps(merged(GOOD, ds)))
    (folder / "run.json").write_text(json.dumps({"model": MODEL}))
    files = ["--ds_config", str(folder / "ds.json"), "--run", str(folder / "run.json")]
    sets = [part for flag in flags for part in ("--set", flag)]
    return resolve(parse_run_flags([*files, *sets]), world=1, device=device)


def built(run: Resolved, dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(run.run.model)
    initialize(model, run.run.model, seed=0)
    return model.to(dtype)


def outcome(model: GPT, step: int = 0) -> list[torch.Tensor]:
    """Loss and gradients of one step."""
    ids = torch.randint(0, 101, (2, 161), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    with model.context.activate(BatchContext(seed=1, step=step, first_sample=2 * step)):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def agree(got: list[torch.Tensor], wanted: list[torch.Tensor], bound: float) -> None:
    for mine, its in zip(got, wanted, strict=True):
        assert float((mine - its).norm()) <= bound * float(its.norm())


@pytest.mark.parametrize("onednn", [True, False])
def test_the_defaults_are_the_fast_ones(onednn, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "prefers_onednn", lambda: onednn)
    run = resolved(tmp_path)
    model, plain = built(run), built(run)
    apply_speed(model, run)
    assert model.head.fused and not any(block.is_compiled for block in model.blocks)
    wanted = onednn_linear if onednn else F.linear
    projections = [model.head, *(b.attention.qkv for b in model.blocks), model.blocks[1].mlp.down]
    assert all(layer.project is wanted for layer in projections)
    agree(outcome(model), outcome(plain), 1e-5)


def test_each_can_be_turned_off(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "prefers_onednn", lambda: True)
    run = resolved(tmp_path, "speed.loss=plain", "speed.matmul=torch", "speed.compile=off")
    model = built(run)
    apply_speed(model, run)
    assert not model.head.fused and model.head.project is F.linear


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ((), [None]),
        (("speed.cuda_graphs=true",), ["reduce-overhead"]),
        (("speed.compile=off",), []),
        (("model.dropout=0.1",), []),
        (("data.document_mask=true",), []),
    ],
)
def test_a_gpu_compiles_the_blocks(flags, wanted, tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(GPT, "compile_blocks", lambda self, mode: modes.append(mode))
    run = resolved(tmp_path, *flags, device="cuda")
    apply_speed(built(run), run)
    assert modes == wanted


@pytest.mark.parametrize("works", [True, False])
def test_a_gpu_attends_with_the_triton_kernel_under_dropout(works, tmp_path, monkeypatch):
    kernel = pytest.importorskip("fgpt.model.kernels.dropout_attention")
    monkeypatch.setattr(kernel, "works_here", lambda dtype: works)
    run = resolved(tmp_path, "model.dropout=0.1", device="cuda")
    model = built(run)
    apply_speed(model, run)
    wanted = kernel.dropout_attention if works else None
    assert all(block.attention.dropout.attention is wanted for block in model.blocks)
    apply_speed(plain := built(run), resolved(tmp_path, "model.dropout=0.1"))
    assert plain.blocks[0].attention.dropout.attention is None


@pytest.mark.parametrize(
    ("flags", "works", "shape"),
    [
        ((), True, (8 * 160, 101)),
        ((), False, (8 * 160, 101)),
        (("speed.compile=off",), True, None),
        (("speed.loss=plain",), True, None),
    ],
)
def test_a_gpu_compiles_the_loss_of_the_fused_head(flags, works, shape, tmp_path, monkeypatch):
    tried = []

    def compile_chunk_loss(n_tokens, vocab_size, dtype, device, *, softcap, z_loss):
        tried.append((n_tokens, vocab_size))
        assert (dtype, device.type, softcap, z_loss) == (torch.float32, "cuda", 30.0, 1e-4)
        return eager_chunk_loss if works else None

    monkeypatch.setattr(compiled_chunk_loss, "compile_chunk_loss", compile_chunk_loss)
    terms = ("model.logit_softcap=30", "model.z_loss=1e-4")
    run = resolved(tmp_path, *flags, *terms, device="cuda")
    monkeypatch.setattr(GPT, "compile_blocks", lambda self, mode: None)
    apply_speed(model := built(run), run)
    assert tried == ([] if shape is None else [shape])
    assert model.head.chunk_loss is (eager_chunk_loss if tried and works else None)
    apply_speed(plain := built(run), resolved(tmp_path, *terms))
    assert plain.head.chunk_loss is None  # a CPU has no use for it


@pytest.mark.parametrize(
    ("flags", "shapes"),
    [
        (("model.dropout=0.1",), [(8, 160, 64)]),
        (("model.dropout=0.1", "data.seq_len=40"), [(8, 40, 64)]),
        (("model.dropout=0.1", "speed.compile=off"), []),
        (("model.dropout=0.1", "speed.recompute=cheap"), []),
        ((), []),
    ],
)
def test_a_gpu_compiles_dropout(flags, shapes, tmp_path, monkeypatch):
    def compiled(x, hashes, p):
        return drop(x, hashes, p)

    tried = []
    trial = lambda shape, dtype, device: tried.append(shape) or compiled  # noqa: E731
    monkeypatch.setattr(compiled_dropout, "compile_drop", trial)
    monkeypatch.setattr(speed, "use_dropout_attention", lambda *_: None)
    monkeypatch.setattr(GPT, "compile_blocks", lambda self, mode: None)
    ds = {"activation_checkpointing": {}} if "speed.recompute=cheap" in flags else {}
    run = resolved(tmp_path, *flags, device="cuda", **ds)
    apply_speed(model := built(run), run)
    layers = [m for m in model.modules() if isinstance(m, Dropout)]
    assert tried == shapes and len(layers) == 7
    assert all(layer.drop is (compiled if shapes else drop) for layer in layers)


@pytest.mark.parametrize("flag", ["speed.compile=blocks", "model.dropout=0.1"])
def test_a_gpu_without_a_compiler_trains_eagerly(flag, tmp_path, monkeypatch):
    """Triton builds C code in the first forward pass (F5)."""
    kernel = pytest.importorskip("fgpt.model.kernels.dropout_attention")
    monkeypatch.setattr(kernel, "works_here", lambda dtype: pytest.fail("would compile"))
    run = resolved(tmp_path, flag, device="cuda")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    model = built(run)
    apply_speed(model, run)
    assert not any(block.is_compiled for block in model.blocks)
    assert all(block.attention.dropout.attention is None for block in model.blocks)


@pytest.mark.parametrize(("capability", "flash"), [((9, 0), False), ((8, 0), True)])
def test_hopper_attends_with_cudnn(capability, flash, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    before = torch._C._get_sdp_priority_order()
    try:
        prefer_fast_attention(torch.device("cpu"))
        assert torch._C._get_sdp_priority_order() == before
        prefer_fast_attention(torch.device("cuda", 0))
        after = torch._C._get_sdp_priority_order()
    finally:
        torch._C._set_sdp_priority_order(before)
    assert sorted(after) == sorted(before)
    assert (after == before) == flash
    if not flash:
        assert after[0] == int(SDPBackend.CUDNN_ATTENTION.value)


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cheap_recomputation_changes_nothing(precision, segments, attention, tmp_path):
    ds: dict[str, Any] = {"activation_checkpointing": {"number_checkpoints": segments}}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    run = resolved(tmp_path, "speed.recompute=cheap", f"model.attention={attention}", **ds)
    model, plain = built(run, dtype), built(run, dtype)
    apply_speed(model, run)
    apply_speed(plain, run)
    apply_checkpointing(model, run.settings.checkpointing, None, run.run.speed.recompute)
    for got, wanted in zip(outcome(model), outcome(plain), strict=True):
        assert torch.equal(got, wanted)


def test_cheap_recomputation_multiplies_once(tmp_path):
    """Of each block the forward pass' 4 products and its attention; all recomputed, twice."""
    flops = {}
    for recompute in ("none", "cheap", "all"):
        run = resolved(tmp_path, "model.attention=sdpa")
        model = built(run)
        if recompute != "none":
            apply_checkpointing(model, {}, None, recompute)
        with FlopCounterMode(display=False) as counter:
            outcome(model)
        flops[recompute] = counter.get_total_flops()
    assert flops["cheap"] == flops["none"]
    # the last product of a block is needed by nobody
    products = 2 * 2 * 160 * 2 * (64 * 3 * 64 + 64 * 64 + 64 * 256)
    assert flops["all"] == flops["none"] + products


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_agree_and_are_compiled_once(precision, tmp_path):
    run = resolved(tmp_path)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model, plain = built(run, dtype), built(run, dtype)
    apply_speed(model, run)
    apply_speed(plain, run)
    model.compile_blocks()
    exact = outcome(built(run))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        got, wanted = outcome(model, step), outcome(plain, step)
        if precision == "fp32":
            agree(got, wanted, 1e-5)
        own, slow = (
            sum(float((x.float() - true).norm()) for x, true in zip(some, exact, strict=True))
            for some in (got, wanted)
        )
        assert own <= 1.2 * slow + 1e-5
    model.eval()
    with torch.no_grad():
        cache = KVCache(run.run.model, torch.zeros(1, dtype=torch.int64), 8, dtype)
        for token in range(6):
            model.decode(torch.tensor([[token]]), cache)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def losses_of_20_steps(run: Resolved) -> list[float]:
    engine = build_engine(run, World(), torch.device("cpu"))
    ids = torch.randint(0, 101, (8, 65), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(ids[:, :-1], ids[:, 1:])
    return [engine.train_batch([batch]).result().loss for _ in range(20)]


def test_fp8_multiplies_in_the_blocks_and_learns_as_bf16(tmp_path):
    plain = ("train.engine=plain", "data.seq_len=64")
    runs = [
        resolved(tmp_path, *plain, f"speed.matmul={kind}", bf16={"enabled": True})
        for kind in ("fp8", "auto")
    ]
    model = built(runs[0], torch.bfloat16)
    apply_speed(model, runs[0])
    products = [m.project for m in model.modules() if isinstance(m, Linear)]
    assert len(products) == 8 and set(products) == {fp8_linear}
    assert model.head.project is F.linear
    eight, sixteen = map(losses_of_20_steps, runs)
    fall = sixteen[0] - sixteen[-1]
    assert fall > 1 and eight != sixteen
    for mine, its in zip(eight, sixteen, strict=True):
        assert mine == pytest.approx(its, abs=0.1 * fall)


def test_fp8_on_a_gpu_that_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    flags = ("train.engine=plain", "speed.matmul=fp8")
    run = resolved(tmp_path, *flags, bf16={"enabled": True})
    with pytest.raises(LaunchError, match="8.9 or more, this one has 8.0: write speed.matmul auto"):
        use_fp8(built(run), "cuda")
    use_fp8(built(run), run.device)  # a CPU does it whatever GPU there is
