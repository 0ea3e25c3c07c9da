"""config.json of transformers <-> `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fgpt.config.schema import ModelConfig, Shapes
from fgpt.errors import CheckpointError
from fgpt.inference.hf_layout import FAMILIES, GPT2, LLAMA, QWEN3, Family

# key -> the only values that leave the numbers as FGPT computes them; the first is the default
_FIXED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "llama": {"hidden_act": ("silu", "swish"), "pretraining_tp": (1,)},
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

    `where` starts the message of CheckpointError: for another class, or an option that FGPT does
    not compute.
    """
    family = next((f for f in FAMILIES if f.model_type == values.get("model_type")), None)
    if family is None:
        known = ", ".join(f.architecture for f in FAMILIES)
        raise CheckpointError(
            f"{where}: model_type {values.get('model_type')!r} is none that FGPT reads: {known}"
        )
    _refuse_other_options(values, family, where)
    try:
        config = _gpt2(values) if family is GPT2 else _llama(values, family, where)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{where}: damaged: {type(error).__name__}: {error}; export the model again"
        ) from error
    return family, config


def _refuse_other_options(values: Mapping[str, Any], family: Family, where: str) -> None:
    for key, allowed in {**_FIXED[family.model_type], **_FIXED_EVERYWHERE}.items():
        if (value := values.get(key, allowed[0])) not in allowed:
            raise CheckpointError(
                f"{where}: {key} {value!r} changes what the model computes: FGPT has {allowed[0]!r}"
                " only"
            )
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise CheckpointError(f"{where}: {key} {rope!r} is no object; export the model again")
        kind = rope.get("rope_type", rope.get("type", "default"))
        others = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or others or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(
                f"{where}: {key} {rope!r} changes what the model computes: FGPT has unscaled"
                " rotary positions only"
            )
    if any(kind != "full_attention" for kind in values.get("layer_types") or ()):
        raise CheckpointError(
            f"{where}: layer_types other than full_attention: FGPT attends to all earlier tokens"
        )


def _gpt2(values: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(
        preset="hf-gpt2",
        vocab_size=_count(values, "vocab_size", 50257),
        max_seq_len=_count(values, "n_positions", 1024),
        n_layer=_count(values, "n_layer", 12),
        d_model=(d_model := _count(values, "n_embd", 768)),
        n_head=(n_head := _count(values, "n_head", 12)),
        n_kv_head=n_head,
        d_head=_divided(d_model, n_head),
        d_ff=_count(values, "n_inner", 4 * d_model),
        norm_eps=float(values.get("layer_norm_epsilon", 1e-5)),
        init_std=float(values.get("initializer_range", 0.02)),
        tied_head=bool(values.get("tie_word_embeddings", True)),
        **GPT2.options,
    )


def _llama(values: Mapping[str, Any], family: Family, where: str) -> ModelConfig:
    has_bias = {bool(values.get("attention_bias", False))}
    if family is LLAMA:
        has_bias.add(bool(values.get("mlp_bias", False)))
    if len(has_bias) > 1:
        raise CheckpointError(
            f"{where}: attention_bias and mlp_bias differ: FGPT has biases in all linear layers or"
            " in none"
        )
    rope = values.get("rope_parameters") or {}
    d_model = _count(values, "hidden_size", 4096)
    n_head = _count(values, "num_attention_heads", 32)
    is_qwen = family is QWEN3
    head_default = 128 if is_qwen else d_model // n_head
    return ModelConfig(
        preset=f"hf-{family.model_type}",
        vocab_size=_count(values, "vocab_size", 151936 if is_qwen else 32000),
        max_seq_len=_count(values, "max_position_embeddings", 32768 if is_qwen else 2048),
        n_layer=_count(values, "num_hidden_layers", 32),
        d_model=d_model,
        n_head=n_head,
        n_kv_head=_count(values, "num_key_value_heads", 32 if is_qwen else n_head),
        d_head=_count(values, "head_dim", head_default),
        d_ff=_count(values, "intermediate_size", 22016 if is_qwen else 11008),
        rotary_base=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        init_std=float(values.get("initializer_range", 0.02)),
        tied_head=bool(values.get("tie_word_embeddings", False)),
        **{"bias": has_bias.pop(), **family.options},
    )


def _count(values: Mapping[str, Any], key: str, default: int) -> int:
    """A count >= 1; null means the default, as in transformers. Raises ValueError."""
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {value!r}")
    return value


def _divided(width: int, heads: int) -> int:
    if width % heads:
        raise ValueError(f"n_embd {width} does not divide into {heads} heads")
    return width // heads
