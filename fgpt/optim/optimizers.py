"""The optimizers of the DeepSpeed JSON, as data: parameters, states, and what implements them.

DeepSpeed 0.19.8 chooses an optimizer's implementation by the JSON, and each takes other parameters:

    torch   torch.optim; of Adam and AdamW with torch_adam true, which FGPT fills in where torch's
            fused Adam computes the same (`fgpt.config.derive`)
    cpu     DeepSpeed's C++ operator, with offload_optimizer.device cpu (compiled at first use)
    fused   DeepSpeed's FusedAdam, otherwise (compiled at first use)

DeepSpeed knows `bitsandbytes` optimizers by no name: FGPT builds them and hands them over. So it
does with Muon: with clipping and ZeRO, DeepSpeed's clips the orthogonalized update instead of the
gradient (its issue 8439).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fgpt.utils.keys import Key

Implementation = Literal["torch", "cpu", "fused", "bitsandbytes", "fgpt"]

_LR = Key("number", 1e-3, low=0, open_low=True, auto=True)
_DECAY = Key("number", 0.0, low=0, auto=True)
_BETAS = Key("pair", [0.9, 0.999], low=0, high=1, open_high=True, auto=True)
_EPS = Key("number", 1e-8, low=0, open_low=True, auto=True)
_ADAM: Mapping[str, Key] = {"lr": _LR, "betas": _BETAS, "eps": _EPS, "weight_decay": _DECAY}

_UNUSED = "it changes no number of a training step"
_TORCH_UNUSED: Mapping[str, Key] = {
    "maximize": Key("bool", False, only_default="it would increase the loss"),
    "capturable": Key("bool", unread=_UNUSED),
    "differentiable": Key("bool", unread=_UNUSED),
}
_MAX_GRAD_NORM: Mapping[str, Key] = {
    "max_grad_norm": Key(
        "number",
        refused="DeepSpeed raises on it after the model is built",
        instead="gradient_clipping",
    )
}

_ADAM_PARAMS: Mapping[Implementation, Mapping[str, Key]] = {
    "torch": {
        "amsgrad": Key("bool", False),
        "foreach": Key("bool", unread="DeepSpeed removes it and passes null"),
        "fused": Key("bool", null=True),
        **_TORCH_UNUSED,
    },
    "cpu": {
        "bias_correction": Key("bool", True),
        "amsgrad": Key("bool", False, only_default="DeepSpeedCPUAdam ignores it"),
        "fp32_optimizer_states": Key("bool", True),
    },
    "fused": {
        "bias_correction": Key("bool", True),
        "amsgrad": Key("bool", False, only_default="FusedAdam raises on it"),
        "set_grad_none": Key("bool", True),
    },
}
"""The parameters that only some of Adam's implementations take."""

_ADAM_CLASSES: Mapping[Implementation, str] = {
    "torch": "torch.optim.Adam/AdamW (torch_adam true)",
    "cpu": "DeepSpeedCPUAdam (offload_optimizer without torch_adam)",
    "fused": "FusedAdam (no torch_adam)",
}


@dataclass(frozen=True)
class Optimizer:
    """One value of optimizer.type."""

    name: str
    params: Mapping[str, Key]
    """optimizer.params; `keys` adds those of Adam's implementation."""
    is_adam: bool = False
    """Adam and AdamW: the plain engine has them too."""
    states: tuple[str, ...] = ()
    """State tensors of a parameter's size, by torch's names; fp32, if not bf16_optimizer_states."""
    state_bytes: int = 4
    """Bytes of a value of a state, if not bf16_optimizer_states."""
    optional_states: Mapping[str, str] = field(default_factory=dict)
    """Parameter of the JSON -> the state tensor that it adds where it is neither 0 nor false."""
    operators: Mapping[Implementation, str] = field(default_factory=dict)
    """DeepSpeed's implementations -> the builder of their C++ operator; torch's otherwise."""
    matrix_states: tuple[str, ...] = ()
    """The states of matrices of blocks, where other parameters have other `states`."""
    package: str = ""
    """The optional package that implements it."""
    is_own: bool = False
    """FGPT implements it."""
    zero_untested: bool = False
    """Not one of DeepSpeed's own; ZeRO needs zero_allow_untested_optimizer."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO stages that it works with without offload; with optimizer offload: 1 to 3."""
    why_stages: str = ""
    """Why it does not work with the others."""
    cuda_stages: tuple[int, ...] | None = None
    """`stages` on a GPU, where they differ."""
    has_mup: bool = False
    """The size of its updates follows neither that of gradients nor that of weights, as muP's
    learning rates suppose."""
    needs_whole_tensors: bool = False
    """Its update uses norms of whole weights, which a tensor-parallel rank does not have."""
    refused: str = ""
    """Why FGPT does not train with it, though DeepSpeed knows it."""

    @property
    def is_handed_over(self) -> bool:
        """Whether FGPT builds it for DeepSpeed, which builds the others."""
        return self.is_own or bool(self.package)

    def keys(self, implementation: Implementation) -> Mapping[str, Key]:
        """The parameters that this optimizer takes in this implementation."""
        if not self.is_adam:
            return {**self.params, **_MAX_GRAD_NORM}
        refusal = f"{_ADAM_CLASSES[implementation]} does not take it"
        others = {
            name: replace(key, refused=refusal)
            for keys in _ADAM_PARAMS.values()
            for name, key in keys.items()
        }
        return {**others, **self.params, **_ADAM_PARAMS[implementation], **_MAX_GRAD_NORM}

    def state_names(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """The state tensors that a parameter may have with these optimizer.params."""
        optional = (s for name, s in self.optional_states.items() if params.get(name))
        return (*self.matrix_states, *self.states, *optional)

    def n_states(self, name: str, n_dims: int, params: Mapping[str, Any]) -> int:
        """The number of state tensors of a parameter with these optimizer.params."""
        if self.matrix_states and is_matrix(name, n_dims):
            return len(self.matrix_states)
        return len(self.state_names(params)) - len(self.matrix_states)


def is_matrix(name: str, n_dims: int) -> bool:
    """Whether a parameter is a matrix of a block, which Muon trains: not an embedding, nor the
    head."""
    return n_dims == 2 and name.startswith("blocks.")


def peak_rate(params: Mapping[str, Any]) -> float:
    """The learning rate that a schedule moves; of Muon, that of the matrices of blocks."""
    rate: float = params.get("muon_lr") or params.get("lr", _LR.default)
    return rate


def adam_rate(params: Mapping[str, Any]) -> float:
    """Muon's learning rate of what AdamW trains; a schedule moves it by the same factor."""
    rate: float = params.get("adam_lr") or params.get("lr", _LR.default)
    return rate


_CUDA_ONLY = "its kernel exists on CUDA only"
_MUP = "it needs the package mup, and FGPT's model is not parametrized for it"
MOMENTUM = "momentum_buffer"
"""torch's name of the momentum of SGD and Muon."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADAM_OPERATORS: Mapping[Implementation, str] = {
    "cpu": "CPUAdamBuilder",
    "fused": "FusedAdamBuilder",
}
_AMSGRAD = {"amsgrad": "max_exp_avg_sq"}


def _8bit(name: str, weight_decay: float) -> Optimizer:
    """An Adam of bitsandbytes: states of 8 bits with one fp32 scale for 256 values (Dettmers et al.
    2021). `weight_decay`: the package's default.
    """
    params: Mapping[str, Key] = {
        **_ADAM,
        "weight_decay": replace(_DECAY, default=weight_decay),
        "min_8bit_size": Key("int", 4096, low=1),
    }
    return Optimizer(
        name,
        params,
        states=("state1", "state2"),
        state_bytes=1,
        package="bitsandbytes",
        has_mup=True,
        zero_untested=True,
    )


_ALL = (
    Optimizer(
        "AdamW",
        {
            **_ADAM,
            "torch_adam": Key("bool", False),
            "adam_w_mode": Key("bool", unread="AdamW always decouples its weight decay"),
        },
        is_adam=True,
        has_mup=True,
        states=_MOMENTS,
        optional_states=_AMSGRAD,
        operators=_ADAM_OPERATORS,
    ),
    Optimizer(
        "Adam",
        {**_ADAM, "torch_adam": Key("bool", False), "adam_w_mode": Key("bool", True)},
        is_adam=True,
        has_mup=True,
        states=_MOMENTS,
        optional_states=_AMSGRAD,
        operators=_ADAM_OPERATORS,
    ),
    Optimizer(
        "SGD",
        {
            "lr": _LR,
            "momentum": Key("number", 0.0, low=0, high=1, open_high=True),
            "dampening": Key("number", 0.0, low=0),
            "weight_decay": _DECAY,
            "nesterov": Key("bool", False),
            "foreach": Key("bool", null=True),
            "fused": Key("bool", null=True),
            "maximize": _TORCH_UNUSED["maximize"],
            "differentiable": _TORCH_UNUSED["differentiable"],
        },
        optional_states={"momentum": MOMENTUM},
        zero_untested=True,
    ),
    Optimizer(
        "Adagrad",
        {"lr": replace(_LR, default=1e-2), "weight_decay": _DECAY, "eps": _EPS},
        states=("sum",),
        has_mup=True,
        operators={"cpu": "CPUAdagradBuilder"},
        stages=(0,),
        why_stages="ZeRO forgets Adagrad's parameter groups and raises IndexError",
    ),
    Optimizer(
        "Lion",
        {"lr": _LR, "betas": _BETAS, "weight_decay": _DECAY},
        states=("exp_avg",),
        has_mup=True,
        operators={"cpu": "CPULionBuilder", "fused": "FusedLionBuilder"},
        stages=(),
        why_stages=_CUDA_ONLY,
        cuda_stages=(0, 1, 2, 3),
    ),
    Optimizer(
        "Lamb",
        {
            **_ADAM,
            "bias_correction": Key("bool", True),
            "eps_inside_sqrt": Key("bool", False),
            "max_coeff": Key("number", 10.0, low=0),
            "min_coeff": Key("number", 0.01, low=0),
        },
        states=_MOMENTS,
        operators={"fused": "FusedLambBuilder"},
        stages=(),
        why_stages=f"{_CUDA_ONLY}, and ZeRO shards the weights whose norms it needs",
        cuda_stages=(0,),
        needs_whole_tensors=True,
    ),
    _8bit("AdamW8bit", 0.01),
    _8bit("Adam8bit", 0.0),
    Optimizer(
        "Muon",
        {
            "lr": _LR,
            "muon_lr": Key("number", low=0, open_low=True, null=True),
            "adam_lr": Key("number", low=0, open_low=True, null=True),
            "momentum": Key("number", 0.95, low=0, high=1, open_high=True),
            "nesterov": Key("bool", True),
            "betas": replace(_BETAS, default=[0.9, 0.95]),
            "eps": replace(_EPS, default=1e-10),
            "weight_decay": _DECAY,
            "ns_method": Key("string", "standard", words=("standard", "gram")),
            "ns_steps": Key("int", 5, low=1, high=99),
            "adjust_lr_fn": Key("string", "original", words=("original", "match_rms_adamw")),
            "adam_w_mode": Key("bool", True, only_default="Muon's weight decay is AdamW's"),
            "torch_adam": Key("bool", unread=_UNUSED),
        },
        states=_MOMENTS,
        matrix_states=(MOMENTUM,),
        has_mup=True,
        is_own=True,
    ),
    Optimizer("MuAdam", {}, refused=_MUP),
    Optimizer("MuAdamW", {}, refused=_MUP),
    Optimizer("MuSGD", {}, refused=_MUP),
)

OPTIMIZERS: Mapping[str, Optimizer] = {optimizer.name.lower(): optimizer for optimizer in _ALL}
"""Lower-case name -> optimizer: all that DeepSpeed knows by name, SGD, and those of packages."""
