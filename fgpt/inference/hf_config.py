"""config.json of transformers <-> `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fgpt.config.run_file import run_keys
from fgpt.config.schema import ModelConfig, Shapes
from fgpt.errors import CheckpointError
from fgpt.inference.hf_layout import FAMILIES, GPT2, LLAMA, Family
from fgpt.utils.keys import shown

# key -> the only values that leave the numbers as FGPT computes them; the first is the default
_FIXED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "llama": {"hidden_act": ("silu", "swish"), "pretraining_tp": (1, None)},
    "qwen3": {
        "hidden_act": ("silu", "swish"),
        "use_sliding_window": (False,),
        "attention_bias": (False,),
    },
}
_FIXED_EVERYWHERE: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "is_encoder_decoder": (False,),
}
_GPT2_KEYS: Mapping[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 50257),
    "max_seq_len": ("n_positions", 1024),
    "n_layer": ("n_layer", 12),
    "d_model": ("n_embd", 768),
    "n_head": ("n_head", 12),
    "d_ff": ("n_inner", None),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "init_std": ("initializer_range", 0.02),
    "tied_head": ("tie_word_embeddings", True),
}
_LLAMA_KEYS: Mapping[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32000),
    "max_seq_len": ("max_position_embeddings", 2048),
    "n_layer": ("num_hidden_layers", 32),
    "d_model": ("hidden_size", 4096),
    "n_head": ("num_attention_heads", 32),
    "n_kv_head": ("num_key_value_heads", None),
    "d_head": ("head_dim", None),
    "d_ff": ("intermediate_size", 11008),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "init_std": ("initializer_range", 0.02),
    "tied_head": ("tie_word_embeddings", False),
}
_QWEN3_KEYS: Mapping[str, tuple[str, Any]] = {
    **_LLAMA_KEYS,
    "vocab_size": ("vocab_size", 151936),
    "max_seq_len": ("max_position_embeddings", 32768),
    "n_kv_head": ("num_key_value_heads", 32),
    "d_head": ("head_dim", 128),
    "d_ff": ("intermediate_size", 22016),
}
KEYS = {"gpt2": _GPT2_KEYS, "llama": _LLAMA_KEYS, "qwen3": _QWEN3_KEYS}
"""Model type -> field of `ModelConfig` -> key of config.json, and the value of an absent one."""


def to_hf_config(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the keys of config.json that describe the model."""
    shapes = Shapes.of(config)
    common = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_head,
        "initializer_range": config.init_std,
    }
    if family is GPT2:
        return common | {
            "n_positions": config.max_seq_len,
            "n_embd": config.d_model,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": shapes.d_ff,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        }
    biases = {"attention_bias": config.bias} | (
        {"mlp_bias": config.bias} if family is LLAMA else {}
    )
    return common | {
        "max_position_embeddings": config.max_seq_len,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": shapes.n_kv_head,
        "head_dim": shapes.d_head,
        "intermediate_size": shapes.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rotary_base,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "attention_dropout": config.dropout,
        **biases,
    }


def from_hf_config(values: Mapping[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """Return the model class and the model that a config.json describes, without dropout.

    `where` starts the message of CheckpointError: for another class, an option that FGPT does not
    compute, or a value out of the run file's range.
    """
    family = next((f for f in FAMILIES if f.model_type == values.get("model_type")), None)
    if family is None:
        known = ", ".join(f.architecture for f in FAMILIES)
        kind = shown(values.get("model_type"))
        raise CheckpointError(f"{where}: model_type {kind} is none that FGPT reads: {known}")
    _refuse_other_options(values, family, where)
    given: dict[str, Any] = {}
    for field, (key, default) in KEYS[family.model_type].items():
        value = values.get(key)
        given[field] = _checked(field, key, default if value is None else value, where)
    config = _gpt2(given, where) if family is GPT2 else _llama(given, values, family, where)
    return family, config


def _checked(field: str, key: str, value: Any, where: str) -> Any:
    """Return the value, of the type of the field of ModelConfig, whose range in a run file it has.

    Raises CheckpointError.
    """
    rule = (run_keys()["model"].keys or {})[field]
    if complaint := rule.complaint(value):
        raise CheckpointError(f"{where}: {key} is {shown(value)}: {complaint}")
    return float(value) if rule.kind == "number" else value


def _refuse_other_options(values: Mapping[str, Any], family: Family, where: str) -> None:
    for key, allowed in {**_FIXED[family.model_type], **_FIXED_EVERYWHERE}.items():
        if (value := values.get(key, allowed[0])) not in allowed:
            raise CheckpointError(
                f"{where}: {key} {shown(value)} changes what the model computes: FGPT has"
                f" {shown(allowed[0])} only"
            )
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise CheckpointError(
            f"{where}: layer_types {shown(kinds)} is no list of full_attention: FGPT reads models"
            " without sliding windows only"
        )


def _gpt2(given: Mapping[str, Any], where: str) -> ModelConfig:
    d_model, n_head = given["d_model"], given["n_head"]
    if d_model % n_head:
        raise CheckpointError(f"{where}: n_embd {d_model} does not divide into n_head {n_head}")
    filled = {"d_ff": given["d_ff"] or 4 * d_model}
    filled |= {"n_kv_head": n_head, "d_head": d_model // n_head}
    return ModelConfig(preset="hf-gpt2", **{**given, **filled, **GPT2.options})


def _llama(
    given: Mapping[str, Any], values: Mapping[str, Any], family: Family, where: str
) -> ModelConfig:
    keys = ("attention_bias", "mlp_bias") if family is LLAMA else ("attention_bias",)
    has_bias = {_checked("bias", key, values.get(key, False), where) for key in keys}
    if len(has_bias) > 1:
        raise CheckpointError(
            f"{where}: attention_bias and mlp_bias differ: FGPT has biases in all linear layers or"
            " in none"
        )
    n_head = given["n_head"]
    n_kv_head = given["n_kv_head"] or n_head
    if n_head % n_kv_head:
        raise CheckpointError(
            f"{where}: num_attention_heads {n_head} is not a multiple of num_key_value_heads"
            f" {n_kv_head}"
        )
    d_head = given["d_head"] or given["d_model"] // n_head
    if d_head < 2 or d_head % 2:
        raise CheckpointError(f"{where}: head_dim {d_head}: rotary positions need an even one")
    filled = {"n_kv_head": n_kv_head, "d_head": d_head, "rotary_base": _rotary_base(values, where)}
    filled |= {"bias": has_bias.pop(), **family.options}
    return ModelConfig(preset=f"hf-{family.model_type}", **{**given, **filled})


def _rotary_base(values: Mapping[str, Any], where: str) -> float:
    """The base of unscaled rotary positions, from where transformers 5 reads it: `rope_scaling`
    replaces `rope_parameters`, and the key beside them counts only if the object has none.
    """
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(key) or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: {key} {shown(rope)} is no object; export the model again")
    kind = rope.get("rope_type", rope.get("type", "default"))
    others = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind != "default" or others or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"{where}: {key} {shown(rope)} changes what the model computes: FGPT has unscaled"
            " rotary positions only"
        )
    base = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    checked: float = _checked("rotary_base", "rope_theta", base, where)
    return checked
