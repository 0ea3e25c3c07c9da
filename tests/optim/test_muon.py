"""Muon against torch.optim.Muon and the singular value decomposition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig
from fgpt.optim.build import make_optimizer, matrix_group, muon_update, parameter_groups
from fgpt.optim.muon import MatrixUpdate, Muon, WholeMatrices
from fgpt.optim.newton_schulz import COEFFICIENTS, orthogonalize
from fgpt.optim.optimizers import MOMENTUM

QUERIES, D_HEAD, GROUPS, D_MODEL = 2, 3, 2, 10
CONFIG = ModelConfig(d_model=D_MODEL, n_head=QUERIES * GROUPS, n_kv_head=GROUPS, d_head=D_HEAD)
SHAPES = {
    "embedding.token.weight": (20, D_MODEL),
    "blocks.0.attention.qkv.weight": (GROUPS * (QUERIES + 2) * D_HEAD, D_MODEL),
    "blocks.0.attention.qkv.bias": (GROUPS * (QUERIES + 2) * D_HEAD,),
    "blocks.0.attention.out.weight": (D_MODEL, GROUPS * QUERIES * D_HEAD),
    "blocks.0.mlp.up.weight": (40, D_MODEL),
    "final_norm.weight": (D_MODEL,),
}


def rows_of(part: str) -> list[int]:
    """The rows of q, k or v in the fused projection: (q_1, q_2, k, v) for each key/value head."""
    places = {"q": range(QUERIES), "k": [QUERIES], "v": [QUERIES + 1]}[part]
    per_head = QUERIES + 2
    return [
        (group * per_head + place) * D_HEAD + row
        for group in range(GROUPS)
        for place in places
        for row in range(D_HEAD)
    ]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_orthogonalize_is_a_polynomial_of_the_singular_values(shape: Any, method: Any) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    wanted = u @ torch.diag(s) @ vt
    got = orthogonalize(matrix.float(), method=method, dtype=torch.float32)
    assert (got - wanted).norm() / wanted.norm() < 3e-6
    assert s.min() > 0.6 and s.max() < 1.3
    # a stack is computed like its matrices; zeros stay zeros
    stack = orthogonalize(
        torch.stack([torch.zeros(shape), matrix.float()]), method=method, dtype=torch.float32
    )
    assert stack[0].abs().max() == 0
    torch.testing.assert_close(stack[1], got, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_any_size(dtype: torch.dtype) -> None:
    """A momentum above float16's range, as with a loss scale, and a tiny one."""
    torch.manual_seed(1)
    matrix = torch.randn(8, 12)
    wanted = orthogonalize(matrix, dtype=torch.float32)
    for factor in (1e-4, 1e6):
        got = orthogonalize(matrix * factor, dtype=dtype).float()
        assert (got - wanted).norm() / wanted.norm() < {torch.float32: 1e-2}.get(dtype, 0.06)


def test_split_and_join() -> None:
    update = MatrixUpdate((QUERIES, D_HEAD), "original", 5, "standard", torch.float32)
    name = "blocks.0.attention.qkv.weight"
    weight = torch.randn(SHAPES[name])
    parts = update.split(name, weight)
    for part, matrix in zip("qkv", parts, strict=True):
        torch.testing.assert_close(matrix, weight[rows_of(part)], rtol=0, atol=0)
    torch.testing.assert_close(update.join(name, parts), weight, rtol=0, atol=0)
    assert update.split("blocks.0.mlp.up.weight", weight)[0] is weight


def oracle_step(
    parameters: dict[str, Tensor], gradients: list[dict[str, Tensor]], options: dict[str, Any]
) -> dict[str, Tensor]:
    """The same steps by torch.optim.Muon, with q, k and v as three parameters, and AdamW."""
    muon: dict[str, nn.Parameter] = {}
    adam: dict[str, nn.Parameter] = {}
    for name, value in parameters.items():
        if name.endswith("qkv.weight"):
            muon |= {f"{name}.{p}": nn.Parameter(value[rows_of(p)].clone()) for p in "qkv"}
        elif name.startswith("blocks") and value.dim() == 2:
            muon[name] = nn.Parameter(value.clone())
        else:
            adam[name] = nn.Parameter(value.clone())
    groups = [
        {"params": [p for p in adam.values() if p.dim() == 2]},
        {"params": [p for p in adam.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    decay = options.get("weight_decay", 0.0)
    optimizers = [
        torch.optim.Muon(
            list(muon.values()),
            lr=options.get("muon_lr", options["lr"]),
            weight_decay=decay,
            momentum=options.get("momentum", 0.95),
            nesterov=options.get("nesterov", True),
            adjust_lr_fn=options.get("adjust_lr_fn"),
            ns_steps=options.get("ns_steps", 5),
        ),
        torch.optim.AdamW(
            groups,
            lr=options.get("adam_lr", options["lr"]),
            betas=options.get("betas", (0.9, 0.95)),
            eps=options.get("eps", 1e-10),
            weight_decay=decay,
        ),
    ]
    for gradient in gradients:
        for name, parameter in {**muon, **adam}.items():
            whole, _, part = name.rpartition(".")
            parameter.grad = gradient[whole][rows_of(part)] if part in "qkv" else gradient[name]
        for optimizer in optimizers:
            optimizer.step()
    result = {name: p.detach() for name, p in {**muon, **adam}.items()}
    fused = "blocks.0.attention.qkv.weight"
    joined = torch.empty(SHAPES[fused])
    for part in "qkv":
        joined[rows_of(part)] = result.pop(f"{fused}.{part}")
    return {**result, fused: joined}


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02, "weight_decay": 0.1},
        {"lr": 3e-3, "adjust_lr_fn": "match_rms_adamw", "nesterov": False, "momentum": 0.8},
        {"lr": 1e-3, "muon_lr": 0.05, "adam_lr": 2e-3, "betas": [0.8, 0.9], "eps": 1e-8},
        {"lr": 0.01, "adam_lr": 4e-4, "ns_steps": 3, "weight_decay": 0.01},
    ],
)
def test_steps_are_torchs(options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    values = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    gradients = [{n: torch.randn(s) for n, s in SHAPES.items()} for _ in range(4)]
    wanted = oracle_step(values, gradients, options)
    parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    section = {"type": "Muon", "params": options}
    optimizer = make_optimizer(
        section, parameter_groups(parameters.items(), matrix_group(section, CONFIG))
    )
    assert isinstance(optimizer, Muon)
    update = muon_update(section, CONFIG, torch.bfloat16, on_cuda=False)
    optimizer.orthogonalize = WholeMatrices({p: n for n, p in parameters.items()}, update)
    assert {group["lr"] for group in optimizer.param_groups} == {
        options.get("muon_lr", options["lr"])
    }
    for gradient in gradients:
        for name, parameter in parameters.items():
            parameter.grad = gradient[name]
        optimizer.step()
    for name, parameter in parameters.items():
        moved = (wanted[name] - values[name]).norm()
        # torch multiplies the update by its scale in float32
        assert (parameter - wanted[name]).norm() / moved < 3e-3, name
        has_momentum = MOMENTUM in optimizer.state[parameter]
        assert has_momentum == (name.startswith("blocks") and name.endswith("weight"))


def test_muon_reaches_what_the_rates_say() -> None:
    """With `match_rms_adamw` an element of an update is as large as in AdamW, about 0.2 lr."""
    update = MatrixUpdate((1, 8), "match_rms_adamw", 5, "standard", torch.float32)
    for shape in ((64, 64), (64, 256), (256, 64)):
        rms = update(torch.randn(shape)).square().mean().sqrt()
        assert 0.15 < rms < 0.25


def test_a_pipeline_stage_of_blocks_has_as_many_groups() -> None:
    """DeepSpeed sums the gradient norm over the stages group by group: with others, it hangs."""
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    parameters["blocks.0.mlp_norm.weight"] = nn.Parameter(torch.zeros(D_MODEL))
    blocks = {name: p for name, p in parameters.items() if name.startswith("blocks")}
    matrices = matrix_group({"type": "Muon", "params": {"lr": 0.02, "weight_decay": 0.1}}, CONFIG)
    whole, stage = (parameter_groups(p.items(), matrices) for p in (parameters, blocks))
    assert len(whole) == len(stage) == 3 and all(group["params"] for group in stage)
    assert [group["orthogonal"] for group in stage] == [True, False, False]
    assert [group.get("weight_decay") for group in whole] == [0.1, None, 0.0]
    assert [group.get("weight_decay") for group in stage] == [0.1, 0.0, 0.0]
    kept = [id(p) for group in stage for p in group["params"]]
    assert sorted(kept) == sorted(map(id, blocks.values()))
