"""The models of `transformers` that are the same function as a GPT of FGPT: their configuration and
where each of their tensors is among the logical ones. One table, read in both directions.

    GPT2LMHeadModel    learned positions, LayerNorm, GELU (tanh), biases
    LlamaForCausalLM   rotary positions, RMSNorm, SwiGLU, with or without biases
    Qwen3ForCausalLM   as Llama without biases, and QK-norm

Rotary pairs are (j, j + K/2) on both sides, so no row of a head moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fgpt.config.schema import ModelConfig, Shapes, query_scale, width_ratio
from fgpt.errors import CheckpointError

_LLAMA_LIKE = {"position": "rotary", "norm": "rmsnorm", "norm_place": "pre", "activation": "swiglu"}
_LLAMA_NAMES = {
    "embedding.token": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_LLAMA_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Family:
    """One model class of transformers."""

    architecture: str
    """Its name."""
    model_type: str
    """As in config.json."""
    options: Mapping[str, Any]
    """The fields of `ModelConfig` that it has no choice of."""
    prefix: str
    """Of the names of tensors, which base models lack."""
    block: str
    """Prefix of block i's tensors, up to i."""
    names: Mapping[str, str]
    """Module of FGPT -> module of transformers."""
    qkv: tuple[str, str, str]
    """Modules with the rows of q, k and v, which may be one."""
    transposed: frozenset[str] = frozenset()
    """Modules of transformers whose weight is [I, O]."""


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    options={
        "position": "learned",
        "norm": "layernorm",
        "norm_place": "pre",
        "activation": "gelu",
        "qk_norm": False,
        "bias": True,
    },
    prefix="transformer.",
    block="transformer.h.",
    names={
        "embedding.token": "transformer.wte",
        "embedding.position": "transformer.wpe",
        "attention_norm": "ln_1",
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    qkv=("attn.c_attn",) * 3,
    transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
)
LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    options=_LLAMA_LIKE | {"qk_norm": False},
    prefix="model.",
    block="model.layers.",
    names=_LLAMA_NAMES,
    qkv=_LLAMA_QKV,
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    options=_LLAMA_LIKE | {"qk_norm": True, "bias": False},
    prefix="model.",
    block="model.layers.",
    names=_LLAMA_NAMES,
    qkv=_LLAMA_QKV,
)
FAMILIES = (GPT2, LLAMA, QWEN3)
_NEUTRAL: Mapping[str, Any] = {"window": None, "embedding_scale": 1.0, "logit_softcap": None}
"""The values of fields of `ModelConfig` that all these classes compute."""


class Rows(NamedTuple):
    """Consecutive rows of a logical tensor in a tensor of transformers."""

    name: str
    """The logical tensor."""
    begin: int
    """First row in the logical tensor."""
    hf_begin: int
    """First row (of the transposed tensor, column) in that of transformers."""
    n: int
    """Number of rows."""
    factor: float = 1.0
    """By which the export multiplies the logical values: muP's factors of the forward pass."""


@dataclass(frozen=True)
class HfTensor:
    """A tensor of transformers, made of rows of logical tensors."""

    shape: tuple[int, ...]
    """As transformers has it."""
    is_transposed: bool
    """Whether its columns are the logical rows."""
    rows: tuple[Rows, ...]
    """What it is made of."""


def family_for(config: ModelConfig) -> Family:
    """Return the model class that computes what this model computes.

    Raises CheckpointError naming the options that no class has.
    """
    # of two equally near ones the later is meant: QK-norm is rarer than biases
    obstacles = [(list(_obstacles(family, config)), family) for family in reversed(FAMILIES)]
    found, family = min(obstacles, key=lambda pair: len(pair[0]))
    if found:
        raise CheckpointError(
            f"transformers has no such model: {', '.join(found)} (the nearest one is"
            f" {family.architecture}); FGPT exports models like GPT-2, Llama and Qwen3 only"
        )
    return family


def _obstacles(family: Family, config: ModelConfig) -> Iterator[str]:
    for name, value in {**family.options, **_NEUTRAL}.items():
        if (has := getattr(config, name)) != value:
            yield f"model.{name} {str(has).lower()} instead of {str(value).lower()}"
    if family is GPT2:
        shapes = Shapes.of(config)
        if shapes.n_kv_head != shapes.n_head:
            yield f"model.n_kv_head {shapes.n_kv_head} instead of {shapes.n_head}"
        if shapes.d_head * shapes.n_head != config.d_model:
            yield f"model.d_head {shapes.d_head} instead of d_model / n_head"


def hf_tensors(family: Family, config: ModelConfig) -> dict[str, HfTensor]:
    """Return every tensor of the model class, by its name in transformers' files."""
    from fgpt.parallel.tensor.sharding import full_shapes

    tensors: dict[str, HfTensor] = {}
    for name, shape in full_shapes(config).items():
        module, _, kind = name.rpartition(".")
        prefix = ""
        if module.startswith("blocks."):
            _, index, module = module.split(".", 2)
            prefix = f"{family.block}{index}."
        if module == "attention.qkv":
            parts = _qkv_rows(family, config, name)
        else:
            factor = _factor(config, module)
            parts = [(family.names[module], [Rows(name, 0, 0, shape[0], factor)])]
        for hf_module, rows in parts:
            is_transposed = kind == "weight" and hf_module in family.transposed
            sizes = (sum(part.n for part in rows), *shape[1:])
            sizes = sizes[::-1] if is_transposed else sizes
            tensors[f"{prefix}{hf_module}.{kind}"] = HfTensor(sizes, is_transposed, tuple(rows))
    return tensors


def _factor(config: ModelConfig, module: str) -> float:
    """The factor of a module's parameters: that of the logits goes into the last norm, that of the
    queries into their norm (without one, into their rows).
    """
    if module == "final_norm":
        return 1 / width_ratio(config)
    return query_scale(config) if module == "attention.q_norm" else 1.0


def _qkv_rows(family: Family, config: ModelConfig, name: str) -> list[tuple[str, list[Rows]]]:
    """The rows (q_1 .. q_R, k, v) of each key/value head, in three tensors or one after the other
    in one.
    """
    shapes = Shapes.of(config)
    n_group, width = shapes.n_kv_head, shapes.d_head
    sizes = (shapes.n_head // n_group * width, width, width)  # rows of q, k and v in a group
    modules: dict[str, list[Rows]] = {}
    for part, module in enumerate(family.qkv):
        rows = modules.setdefault(module, [])
        before = sum(r.n for r in rows)
        for group in range(n_group):
            begin = group * sum(sizes) + sum(sizes[:part])
            factor = query_scale(config) if part == 0 and not config.qk_norm else 1.0
            rows.append(Rows(name, begin, before + group * sizes[part], sizes[part], factor))
    return list(modules.items())
