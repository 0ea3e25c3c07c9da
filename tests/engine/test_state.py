"""What the training state says beside its tensors: fp16's loss scale, who saves which copy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import (
    DynamicLossScaler,
    LossScaleConfig,
    LossScaler,
)
from hypothesis import given
from hypothesis import strategies as st

from fgpt.engine.deepspeed.state import DeepSpeedState
from fgpt.engine.state import Progress, assign_writers


def state_of(**optimizer: Any) -> DeepSpeedState:
    """A state without tensors."""
    state: DeepSpeedState = object.__new__(DeepSpeedState)
    state.optimizer, state.masters = SimpleNamespace(**optimizer), []
    return state


def of_zero() -> DeepSpeedState:
    """With the dynamic loss scale of ZeRO's optimizers."""
    return state_of(loss_scaler=DynamicLossScaler(2.0**8, 3, 1.0, 2, False))


def without_zero() -> DeepSpeedState:
    """With that of fp16's optimizers without ZeRO."""
    arguments = {"init_scale": 2.0**8, "scale_window": 3, "min_scale": 1.0}
    return state_of(
        loss_scaler=None,
        loss_scale_config=LossScaleConfig(torch.float16, True, 1.0, arguments),
    )


def test_the_loss_scale_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two overflows, a good step and a resume, the scale doubles when it would have."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # rank 0 logs
    state, resumed = of_zero(), of_zero()
    for overflow in (True, True, False):
        state.optimizer.loss_scaler.update_scale(overflow)
    progress = state.progress(3, 2)
    assert progress.loss_scale is not None and progress.loss_scale["cur_scale"] == 2.0**7
    resumed.restore_loss_scale(progress)
    assert vars(resumed.optimizer.loss_scaler) == vars(state.optimizer.loss_scaler)
    for _ in range(5):
        for each in (state, resumed):
            each.optimizer.loss_scaler.update_scale(False)
    assert vars(resumed.optimizer.loss_scaler) == vars(state.optimizer.loss_scaler)


def test_the_loss_scale_without_zero_and_from_one_to_the_other() -> None:
    state = without_zero()
    config = state.optimizer.loss_scale_config
    config.cur_scale, config.cur_iter, config.last_overflow_iter = 64.0, 9, 5
    progress = state.progress(9, 1)
    for resumed in (of_zero(), without_zero()):
        resumed.restore_loss_scale(progress)
        again = resumed.progress(9, 1).loss_scale
        assert again is not None and progress.loss_scale is not None
        assert again.items() >= progress.loss_scale.items()


@pytest.mark.parametrize("scaler", [LossScaler(1.0), LossScaler(128.0), None])
def test_a_fixed_loss_scale_is_not_state(scaler: Any) -> None:
    state = state_of(loss_scaler=scaler)
    assert state.progress(1, 0) == Progress(1)
    state.restore_loss_scale(Progress(1, loss_scale={"cur_scale": 4.0, "cur_iter": 3.0}))
    assert scaler is None or scaler.cur_scale in (1.0, 128.0)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 5))
def test_copies_are_saved_once_and_alike(sizes: list[int], n_copies: int) -> None:
    writers = assign_writers(sizes, n_copies)
    loads = [0] * n_copies
    for size, writer in zip(sizes, writers, strict=True):
        loads[writer] += size
    assert sum(loads) == sum(sizes) and max(loads) - min(loads) <= max(sizes)
