"""Optimizers and schedulers that DeepSpeed 0.19.8 builds from its JSON, with their parameters.

One Adam is three classes, chosen by DeepSpeed, and each takes other parameters:

    torch_adam true                 torch.optim.AdamW / Adam (takes `fused`, `amsgrad`)
    offload_optimizer.device cpu    DeepSpeedCPUAdam (a C++ extension, compiled at first use)
    otherwise                       FusedAdam (likewise)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fgpt.utils.keys import Key

Build = Literal["torch", "cpu", "fused"]

_LR = Key("number", 1e-3, low=0, open_low=True, auto=True)
_DECAY = Key("number", 0.0, low=0, auto=True)
_BETAS = Key("pair", [0.9, 0.999], low=0, high=1, open_high=True, auto=True)
_EPS = Key("number", 1e-8, low=0, open_low=True, auto=True)
_ADAM: Mapping[str, Key] = {"lr": _LR, "betas": _BETAS, "eps": _EPS, "weight_decay": _DECAY}

_NOT_HERE = "FGPT does not train with it"
_TORCH_REFUSED: Mapping[str, Key] = {
    "maximize": Key("bool", False, only_default="it climbs the loss"),
    "capturable": Key("bool", False, only_default=_NOT_HERE),
    "differentiable": Key("bool", False, only_default=_NOT_HERE),
}
_MAX_GRAD_NORM: Mapping[str, Key] = {
    "max_grad_norm": Key(
        "number",
        refused="DeepSpeed raises on it after the model is built",
        instead="gradient_clipping",
    )
}

_BUILDS: Mapping[Build, Mapping[str, Key]] = {
    "torch": {
        "amsgrad": Key("bool", False),
        "foreach": Key("bool", refused="DeepSpeed takes it out and passes null"),
        "fused": Key("bool", null=True),
        **_TORCH_REFUSED,
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

CLASSES: Mapping[Build, str] = {
    "torch": "torch.optim.Adam/AdamW (torch_adam true)",
    "cpu": "DeepSpeedCPUAdam (offload_optimizer without torch_adam)",
    "fused": "FusedAdam (no torch_adam)",
}

_TORCH_ADAM = Key("bool", False)


@dataclass(frozen=True)
class Optimizer:
    """One value of optimizer.type."""

    name: str
    params: Mapping[str, Key]
    adam: bool = False
    """Adam and AdamW: the parameters of the class DeepSpeed chooses come on top."""
    torch: bool = False
    """Handed to torch.optim by name; ZeRO then asks for zero_allow_untested_optimizer."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO stages it works in without offload; with optimizer offload it works in 1 to 3."""
    why_stages: str = ""
    """Why not in the others."""
    refused: str = ""
    """Known to DeepSpeed, not to FGPT: why."""

    def keys(self, build: Build) -> Mapping[str, Key]:
        """The parameters this optimizer takes when DeepSpeed builds it so."""
        if not self.adam:
            return {**self.params, **_MAX_GRAD_NORM}
        others = {
            name: replace(key, refused=f"{CLASSES[build]} does not take it")
            for other in _BUILDS.values()
            for name, key in other.items()
        }
        return {**others, **self.params, **_BUILDS[build], **_MAX_GRAD_NORM}


_NO_CPU = "its kernel exists on CUDA only, where FGPT has not tested it"
_MUP = "it needs the package mup, and FGPT's model is not parametrised for it"

OPTIMIZERS: Mapping[str, Optimizer] = {
    optimizer.name.lower(): optimizer
    for optimizer in (
        Optimizer("AdamW", {**_ADAM, "torch_adam": _TORCH_ADAM}, adam=True),
        Optimizer(
            "Adam",
            {**_ADAM, "torch_adam": _TORCH_ADAM, "adam_w_mode": Key("bool", True)},
            adam=True,
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
                "maximize": _TORCH_REFUSED["maximize"],
                "differentiable": _TORCH_REFUSED["differentiable"],
            },
            torch=True,
        ),
        Optimizer(
            "Adagrad",
            {"lr": replace(_LR, default=1e-2), "weight_decay": _DECAY, "eps": _EPS},
            stages=(0,),
            why_stages="ZeRO forgets Adagrad's parameter groups and raises IndexError",
        ),
        Optimizer(
            "Lion",
            {"lr": _LR, "betas": _BETAS, "weight_decay": _DECAY},
            stages=(),
            why_stages=_NO_CPU,
        ),
        Optimizer("Lamb", {}, refused=_NO_CPU),
        Optimizer("Muon", {}, refused="its losses under ZeRO-0 and ZeRO-2 differ"),
        Optimizer("MuAdam", {}, refused=_MUP),
        Optimizer("MuAdamW", {}, refused=_MUP),
        Optimizer("MuSGD", {}, refused=_MUP),
    )
}

_STEPS = Key("int", low=1, auto=True)
_RATIO = Key("number", low=0, high=1)
_RATE = Key("number", low=0)
_LAST = Key("int", refused="a resume sets it")
_WARMUP: Mapping[str, Key] = {
    "warmup_num_steps": Key("int", 1000, low=1, auto=True),
    "warmup_type": Key("string", "log", words=("log", "linear")),
    "last_batch_iteration": _LAST,
}
_WARMUP_LR: Mapping[str, Key] = {
    "warmup_min_lr": Key("number", 0.0, low=0, auto=True),
    "warmup_max_lr": Key("number", low=0, open_low=True, auto=True),
    **_WARMUP,
}

SCHEDULERS: Mapping[str, Mapping[str, Key]] = {
    "WarmupLR": _WARMUP_LR,
    "WarmupDecayLR": {"total_num_steps": _STEPS, **_WARMUP_LR},
    "WarmupCosineLR": {
        "total_num_steps": _STEPS,
        "warmup_min_ratio": _RATIO,
        "cos_min_ratio": _RATIO,
        **_WARMUP,
    },
    "OneCycle": {
        "cycle_min_lr": _RATE,
        "cycle_max_lr": _RATE,
        "decay_lr_rate": _RATE,
        "cycle_first_step_size": Key("int", 2000, low=1),
        "cycle_second_step_size": Key("int", low=1, null=True),
        "cycle_first_stair_count": Key("int", 0, low=0),
        "cycle_second_stair_count": Key("int", low=0, null=True),
        "decay_step_size": Key("int", 0, low=0),
        "cycle_momentum": Key("bool", True),
        "cycle_min_mom": _RATIO,
        "cycle_max_mom": _RATIO,
        "decay_mom_rate": _RATE,
        "last_batch_iteration": _LAST,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": Key("number", 1e-3, low=0, open_low=True),
        "lr_range_test_step_size": Key("int", 2000, low=1),
        "lr_range_test_step_rate": _RATE,
        "lr_range_test_staircase": Key("bool", False),
        "last_batch_iteration": _LAST,
    },
}

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "WarmupDecayLR": ("total_num_steps",),
    "WarmupCosineLR": ("total_num_steps",),
    "OneCycle": ("cycle_min_lr", "cycle_max_lr"),
}
"""Scheduler parameters without a default."""
